"""modalities/image.py with timm: its models come through transformers' timm_wrapper."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ASIDE = Path(sys.prefix) / "timm"
SCRIPT = """
import json, sys, torch
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from PIL import Image
from safetensors.torch import save_file
from multi_token.modalities.image import ImageModality

folder = sys.argv[1]
torch.manual_seed(0)
model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
config = {"architecture": "test_vit", "num_classes": 0,
          "pretrained_cfg": {key: model.pretrained_cfg[key] for key in keys}}
with open(folder + "/config.json", "w") as file:
    json.dump(config, file)
save_file(model.state_dict(), folder + "/model.safetensors", {"format": "pt"})
image = Image.effect_noise((50, 40), 90).convert("RGB")
results = {}
for features in ("patches", "pooled", "cls", "mean"):
    modality = ImageModality(encoder=folder, features=features)
    encoder = modality.build_encoder()
    item = modality.prepare(image)
    inputs = modality.collate([item])
    with torch.no_grad():
        values = encoder(**inputs).values
        reference = model.forward_features(inputs["pixel_values"])
    results[features] = {
        "promised": item.num_features, "shape": list(values.shape), "dim": encoder.dim,
        "same": {"patches": torch.equal(values, reference[:, 1:]),
                 "cls": torch.equal(values[:, 0], reference[:, 0])}.get(features),
    }
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_timm_model_gives_the_promised_features_and_they_are_timms_own(tmp_path: Path) -> None:
    if not (ASIDE.is_dir() or importlib.util.find_spec("timm")):
        pytest.skip("timm is not installed: make test-slow puts it aside")
    paths = [str(Path(__file__).resolve().parents[2]), *([str(ASIDE)] if ASIDE.is_dir() else [])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["patches"]["promised"] == 100
    for features, result in results.items():
        assert result["shape"] == [1, result["promised"], result["dim"]], features
    assert results["patches"]["same"] and results["cls"]["same"]
