"""What a command pays before it works, counted in imports, which no busy machine can change; and afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    # torch's compiler alone takes longer to import than torch; drawing on the meta device would pull it in
    "load and draw": ("import tpdne_cli as t; list(t.sample(t.load({model!r}), [1]))", {"torch._dynamo", "sympy"}),
    "describe a StyleGAN3": (
        "from tpdne_cli.networks.stylegan3 import Config, Generator; import torch\n"
        "with torch.device('meta'): Generator(Config(32, channel_base=256, num_layers=4, use_radial_filters=True))",
        {"torch._dynamo", "sympy"},
    ),
    "the command line": ("import tpdne_cli.cli", {"torch", "numpy", "PIL", "tqdm", "safetensors", "tarfile"}),
    "the package": ("import tpdne_cli", {"torch", "numpy", "click", "PIL"}),
}


@pytest.mark.parametrize("what", HEAVY)
def test_imports(what, tiny_model):
    code, forbidden = HEAVY[what]
    script = f"{code.format(model=str(tiny_model))}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not forbidden & set(done.stdout.split()), f"{what} imports what it does not need"


def test_the_end_is_quick_and_leaves_nothing_out():
    script = (
        "import atexit, sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "class Slow:\n    def __del__(self): print('taken apart')\n"
        "sys.modules['torch'].part = Slow(); atexit.register(print, 'registered')\n"
        "sys.argv = ['tpdne', 'faces', '--count', '0']; print('unflushed', end=' ')\n"
        "from tpdne_cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "unflushed registered\n"), done.stderr
