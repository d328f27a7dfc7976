"""Model folders that would run code: pickled weights, and Python files that their settings name."""

import json
import pickle
from pathlib import Path

import pytest
from tiny import tiny_encoder

from vla_rl.encoders.loading import load_model, load_processor

ASKED_FOR_NOTHING = {"revision": None, "trust_remote_code": False}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "code-has-run"


@pytest.fixture
def folder(tmp_path, sentinel):
    """A sound model, with a pickle and a Python file beside it, and settings that name the latter."""
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    folder = tmp_path / "encoder" / "model"
    bomb = pickle.dumps(Touch(sentinel))
    pickle.loads(bomb)
    assert sentinel.exists()  # it would work
    sentinel.unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\nclass Evil:\n    pass\n"
    )
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    change(folder / "config.json", auto_map={name: "evil.Evil" for name in names})
    change(folder / "processor_config.json", auto_map={name: "evil.Evil" for name in names[3:]})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_sound_model_is_loaded_and_what_lies_beside_it_is_not_run(folder, sentinel):
    model = load_model(str(folder), **ASKED_FOR_NOTHING)
    assert type(model).__module__.startswith("transformers.")
    assert load_processor(str(folder), **ASKED_FOR_NOTHING).tokenizer is not None
    assert not sentinel.exists()


def test_weights_that_are_pickled_alone_are_refused(folder, sentinel):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds its weights as a pickle, 'pytorch_model.bin', which can run any code"):
        load_model(str(folder), **ASKED_FOR_NOTHING)
    assert not sentinel.exists()


def test_a_model_whose_class_is_a_python_file_of_the_folder_is_refused(folder, sentinel):
    change(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="holds a model whose code comes with its weights, and nothing of it was run"):
        load_model(str(folder), **ASKED_FOR_NOTHING)
    assert not sentinel.exists()
