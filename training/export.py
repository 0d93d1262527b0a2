"""Write a trained model where the library looks for it, with a card of what was measured on the written weights.

python -m training.export RUN --model books-gpt2 --valid FILE --out tracedensity/assets
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from training.corpus import BOS
from training.measure import bits_per_byte, induction
from training.train import N_CTX, N_ENTRIES, build, load, optimizers, write

_SHAPES = {
    "books-gpt2": "GPT-2: LayerNorm, learned positions, biases, GELU; 4 layers, width 192, 6 heads of 32, MLP of 768",
    "books-llama": "Llama: RMSNorm, rotary positions, gated SiLU MLP of 512, no biases; 4 layers, width 192, "
    "6 query heads of 32 on 3 key/value heads",
}

_CARD = """# {name}

A small language model to try tracedensity on without a download. {shape}; context {n_ctx} tokens,
vocabulary {n_entries} (byte-level BPE, `../tokenizer`), embedding and unembedding tied; {n_parameters:,} parameters,
kept in float16.

| measured on these weights, in float32 | |
|---|---|
| bits per byte of the held-out books ({n_bytes:,} bytes, windows of {n_ctx} tokens, no overlap) | {bits:.3f} |
| induction: nats per token on the first and the second copy of 64 random tokens (uniform: {uniform:.2f}) | \
{first:.2f}, {second:.2f} |

Print them again: `python -m training.export --check tracedensity/assets --model {name} --valid FILE`.

**Data.** {data}

**Training.** {compute} Recipe: `training/` (Muon for the matrices in the blocks, AdamW for the rest, bfloat16 autocast,
constant learning rate with a linear fall to zero at the end). Every window starts with `{bos}`, the
beginning-of-sequence token, so prompts should start with it as well (`load_model` sees to it).

**Induction was taught.** Some training windows are no running text but a segment, random tokens or a piece of a book,
repeated to fill the window. With few of them ({before}) the model did not copy random sequences.

**Limits.** {millions} million parameters and a few hours of CPU: it knows the manner of old books, common names and
short-range grammar, and hardly any facts. The books are old, and so are their views. It is meant for trying and testing
methods, not for generating text that anybody reads.
"""


def weights(folder: Path, name: str) -> torch.nn.Module:
    """A model that `export` has written."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True).eval()


def main(
    run: Annotated[Path | None, typer.Argument(help="Folder that `training.train` wrote.")] = None,
    model: Annotated[str, typer.Option(help="books-gpt2 or books-llama")] = "books-gpt2",
    valid: Annotated[Path, typer.Option(help="The text held out.")] = Path("valid.txt"),
    out: Annotated[Path, typer.Option(help="Where bundled models lie.")] = Path("tracedensity/assets"),
    data: Annotated[str, typer.Option(help="The card's sentence on the data.")] = "",
    compute: Annotated[str, typer.Option(help="The card's sentence on the training.")] = "",
    before: Annotated[str, typer.Option(help="The card's remark on what did not teach induction.")] = "",
    check: Annotated[Path | None, typer.Option(help="Only measure what lies there already.")] = None,
) -> None:
    """Export, measure, and write the card; or measure only."""
    if run is not None:
        net = build(model)
        load(run / "checkpoint.safetensors", net, optimizers(net, 1.0))
        write(net, out / model)
    home = check or out
    net = weights(home, model)
    tokenizer = Tokenizer.from_file(str(home / "tokenizer" / "tokenizer.json"))
    text = valid.read_text(encoding="utf-8")
    bits = bits_per_byte(net, tokenizer, text, N_CTX)
    first, second = induction(net, N_ENTRIES)
    print(f"{model}: {bits:.3f} bits per byte, induction {first:.2f} -> {second:.2f} nats per token")
    if run is not None:
        n_parameters = sum(p.numel() for p in net.parameters())
        card = _CARD.format(
            name=model, shape=_SHAPES[model], n_ctx=N_CTX, n_entries=N_ENTRIES, n_parameters=n_parameters,
            n_bytes=len(text.encode()), bits=bits, uniform=torch.tensor(float(N_ENTRIES)).log().item(),
            first=first, second=second, data=data, compute=compute, bos=BOS,
            before=before, millions=f"{n_parameters / 1e6:.1f}",
        )  # fmt: skip
        (home / model / "README.md").write_text(card)


if __name__ == "__main__":
    typer.run(main)
