"""ExPO (arXiv 2404.16792): go on along the line of a training run, to AFTER + ALPHA (AFTER - BEFORE).

    python examples/extrapolate.py BEFORE AFTER ALPHA OUTPUT     # Hugging Face folders, of one or many files
"""
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

if len(sys.argv) != 5:
    sys.exit(__doc__)
before, after, alpha, output = sys.argv[1:]
old = {name: path for path in Path(before).glob("*.safetensors") for name in safe_open(path, "pt").keys()}
# Weights in AFTER's types and files, all else copied; what resumes a run of bread.py would not fit them.
shutil.copytree(after, output, ignore=shutil.ignore_patterns("*.safetensors", "trainer.*"))
for path in Path(after).glob("*.safetensors"):
    new = safe_open(path, "pt")
    weights = {}
    for name in new.keys():  # mapped, not read: in memory are one file's results and two tensors
        weight = new.get_tensor(name)
        change = weight.float() - safe_open(old[name], "pt").get_tensor(name).float()
        weights[name] = (weight.float() + float(alpha) * change).to(weight.dtype)
    save_file(weights, Path(output) / path.name, {"format": "pt"})
