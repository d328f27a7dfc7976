import numpy as np
import torch
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vla_rl.encoders.pixels import PixelPipeline


def pipeline(tamper: float = 0.0, **settings):
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **settings)

    def reference(frame: np.ndarray) -> dict[str, torch.Tensor]:
        pixels = processor([frame], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels + tamper}

    return PixelPipeline(processor, reference), reference


def test_frames_of_the_models_size_are_not_resampled():
    pixels, _ = pipeline()
    frames = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1.0
    torch.testing.assert_close(pixels(torch.from_numpy(frames)), expected, rtol=0, atol=1e-6)


def test_the_processor_takes_over_where_the_fast_path_would_differ():
    honest, _ = pipeline()
    tampered, reference = pipeline(tamper=0.1)
    frames = np.random.default_rng(1).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    assert honest.uses_torch((48, 40))
    assert not tampered.uses_torch((48, 40))
    expected = torch.cat([reference(frame)["pixel_values"] for frame in frames])
    assert torch.equal(tampered(torch.from_numpy(frames)), expected)


def test_a_filter_that_torch_has_not_is_the_processors():
    nearest, reference = pipeline(resample=0)
    frames = np.random.default_rng(1).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    expected = torch.cat([reference(frame)["pixel_values"] for frame in frames])
    assert torch.equal(nearest(torch.from_numpy(frames)), expected)
