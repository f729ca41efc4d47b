"""Export a Llama to a package that a C++ program loads.

The program is built here, and a prompt is run through it and through the model.

python examples/cpp/prefill.py [--short] [--folder FOLDER]

The package runs without Python and without this library: prefill.cpp beside this file loads it in
forty lines. The model has random weights, and layers that see a window of 128 and the first 4
tokens; the prompt is Python's own source. Needs `pip install -e .[hf]` and a C++ compiler (g++, or
the one in CXX); one to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import compiled_dilated as cd
from compiled_dilated import masks

SOURCE = Path(__file__).with_name("prefill.cpp")
PROGRAM = masks.causal() & (masks.window(128) | masks.sinks(4))


def model_of(longest: int) -> LlamaForCausalLM:
    """A Llama of two layers over bytes, with attention by the program."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        use_cache=False,
    )
    return cd.compile(LlamaForCausalLM(config).eval(), attention=PROGRAM)


def build(folder: Path) -> Path:
    """Compile prefill.cpp against this torch; returns the path of the program."""
    torch_folder = Path(torch.__file__).parent
    include, library = torch_folder / "include", torch_folder / "lib"
    program = folder / "prefill"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", str(SOURCE)]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    command += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command += ["-o", str(program)]
    print("building:", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return program


def next_of(model: LlamaForCausalLM, text: bytes) -> list[tuple[int, float]]:
    """The three likeliest next tokens and their logits, by Python."""
    ids: Tensor = torch.tensor([list(text)])
    with torch.no_grad():
        scores, tokens = model(ids).logits[0, -1].topk(3)
    return list(zip(tokens.tolist(), scores.tolist(), strict=True))


def run(folder: Path, tokens: int) -> None:
    """Export, build, run both, compare."""
    torch.manual_seed(0)
    longest = 65_536
    model = model_of(longest)
    package, prompt = folder / "model.pt2", folder / "prompt.txt"
    prompt.write_bytes(Path(argparse.__file__).read_bytes()[:tokens])

    print("exporting, which compiles ...", flush=True)
    about = cd.export(model, (torch.zeros(1, 64, dtype=torch.long),), package, lengths=(2, longest))
    print(about)
    program = build(folder)
    command = [str(program), str(package), str(prompt)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print("C++:    ", printed.replace("\n", "\n         ").strip())

    expected = next_of(model, prompt.read_bytes())
    print("Python:  next:", *(f"{token} ({score:.4f})" for token, score in expected))
    # The program prints "token (score)" three times.
    words = printed.partition("next:")[2].split()
    tokens_of_cpp = [int(token) for token in words[::2]]
    scores = torch.tensor([float(score.strip("()")) for score in words[1::2]])
    expected_scores = torch.tensor([score for _, score in expected])
    is_same = tokens_of_cpp == [token for token, _ in expected]
    if not is_same or (scores - expected_scores).abs().max() > 1e-3:
        raise SystemExit("C++ and Python disagree")
    print("C++ and Python agree")


def main(arguments: list[str] | None = None) -> None:
    """Run in a folder, by default a temporary one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a prompt of 1,000 bytes, not 20,000")
    parser.add_argument("--folder", type=Path, help="where package and program are kept")
    options = parser.parse_args(arguments)
    tokens = 1000 if options.short else 20_000
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options.folder, tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), tokens)


if __name__ == "__main__":
    main()
