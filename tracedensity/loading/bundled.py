"""Models that come with the package."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


_BUNDLED = {
    "books-gpt2": "GPT-2 architecture (LayerNorm, learned positions, biases), trained on public-domain books",
    "books-llama": "Llama architecture (RMSNorm, rotary positions, gated MLP, grouped queries), same books",
}


def bundled_models() -> dict[str, str]:
    """Name of each model that comes with the package, with one line on what it is."""
    return {name: line for name, line in _BUNDLED.items() if (ASSETS / name / "config.json").is_file()}


def listing_of_bundled() -> str:
    return ", ".join(bundled_models()) or "none in this installation"
