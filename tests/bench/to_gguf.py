"""Convert a made-up model for llama.cpp.

    python tests/bench/to_gguf.py LLAMA_CPP FOLDER --outtype bf16 --outfile FOLDER/bf16.gguf

LLAMA_CPP is its source tree. Its own converter knows tokenizers by a hash and refuses ours, which
splits text as GPT-2's does; this runs it with that answer given. Needs torch, transformers,
sentencepiece and gguf.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the converter with the rest of the command line."""
    source = Path(sys.argv.pop(1)).resolve()
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
