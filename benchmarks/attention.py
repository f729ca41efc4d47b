"""How fast attention is, against dense SDPA and compiled FlexAttention in the same run: `compiled-dilated bench` as a file.

python benchmarks/attention.py --json benchmarks/results/attention.json
"""

from compiled_dilated.cli import app

if __name__ == "__main__":
    import sys

    app(["bench", *sys.argv[1:]])
