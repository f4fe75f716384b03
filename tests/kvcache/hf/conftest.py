import pytest

pytest.importorskip("transformers", reason="transformers is not installed (pip install moe-bitnet[hf])")
