"""What travels between machines, without any machine: LoRA, head, whole policies, and noise by environment."""

import pytest
import torch
from tiny import differing, parameters, tiny_policy

from vla_rl.encoders import LoRASettings
from vla_rl.integrations.ray_policy import Adaptation, load_base, policy_files
from vla_rl.integrations.ray_worker import NoiseByEnv, to_array, to_tensor


def trained(seed=0):
    """A policy whose LoRA, head and normalisation have moved."""
    policy = tiny_policy()
    policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    torch.manual_seed(seed)
    with policy.encoder.trainable("lora") as weights, torch.no_grad():
        for weight in (*weights, *policy.head.parameters(), policy.action_mean):
            weight += torch.randn_like(weight)
    return policy


def test_lora_and_head_make_the_same_policy_of_the_same_base():
    sender, receiver = trained(), tiny_policy()
    sender.encoder.feature_dtype = torch.bfloat16
    adaptation = Adaptation.of(sender)
    adaptation.apply(receiver)
    assert differing(parameters(sender), parameters(receiver)) == set()
    assert receiver.encoder.fingerprint == sender.encoder.fingerprint != tiny_policy().encoder.fingerprint
    assert receiver.encoder.feature_dtype == torch.bfloat16
    names = {name for name in parameters(sender) if "lora_" in name or not name.startswith("encoder.")}
    assert adaptation.tensors.keys() == names and adaptation.nbytes < sum(v.nbytes for v in parameters(sender).values())

    again = Adaptation.of(trained(seed=1))
    again.apply(receiver)  # a second round, with an adapter there already
    assert receiver.encoder.fingerprint == again.fingerprint != adaptation.fingerprint


def test_another_base_or_another_head_is_refused():
    adaptation = Adaptation.of(trained())
    with pytest.raises(ValueError, match=r"has fingerprint \w+ here and \w+ where .* give every machine the same base"):
        adaptation.apply(tiny_policy(seed=1))
    with pytest.raises(ValueError, match=r"have no place here, such as 'head\."):
        adaptation.apply(tiny_policy(hidden_dim=8))
    larger = tiny_policy()
    larger.encoder.add_lora(LoRASettings(r=3, alpha=4))
    with pytest.raises(ValueError, match="the same LoRA settings"):
        adaptation.apply(larger)


def test_all_files_of_a_policy_make_it_again(tmp_path):
    policy = trained()
    files = policy_files(policy)
    assert "policy.json" in files and all(name == name.strip("/") for name in files)
    again = load_base(files, "cpu")
    assert differing(parameters(policy), parameters(again)) == set()
    policy.save_pretrained(tmp_path / "policy")
    from_path = load_base(str(tmp_path / "policy"), "cpu")
    assert from_path.encoder.fingerprint == again.encoder.fingerprint == policy.encoder.fingerprint
    with pytest.raises(FileNotFoundError):
        load_base(str(tmp_path / "nothing"), "cpu")


def test_noise_depends_on_seed_environment_and_episode_alone():
    head = tiny_policy().head
    whole, second = NoiseByEnv(head, seed=4), NoiseByEnv(head, seed=4, first=2)
    state = torch.get_rng_state()
    first_draw = whole(range(4))
    assert torch.equal(torch.get_rng_state(), state), "other users of torch's generator see nothing of it"
    assert first_draw.shape == (4, 16, 2)
    assert torch.equal(second([1]), first_draw[3:])
    later = whole([3])
    assert torch.equal(second([1]), later) and torch.equal(second([0]), first_draw[2:3])
    others = [NoiseByEnv(head, seed=5)([0]), NoiseByEnv(head, seed=4, restarts=1)([0]), first_draw[1:2], later]
    assert not any(torch.equal(other, first_draw[:1]) for other in others)
    assert abs(float(NoiseByEnv(head, seed=0)(range(200)).std()) - 1) < 0.05
    assert NoiseByEnv(tiny_policy(exploration="gaussian").head, seed=0)(range(4)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.bool])
def test_tensors_survive_the_way_through_arrays(dtype):
    tensor = torch.randn(3, 4).to(dtype)
    array = to_array(tensor)
    array.flags.writeable = False
    back = to_tensor(array, torch.device("cpu"), dtype)
    assert back.dtype == dtype and torch.equal(back, tensor)
