"""Train one of the bundled models on any folder of text files.

    python -m training.train FOLDER --model books-gpt2 --out runs/books-gpt2

Interrupt it at any time: the same command goes on where the last checkpoint was written, with the
same batches. The learning rate is constant after the warm-up and falls to zero over the last
`--decay` of the tokens, so a run may also be resumed with more or fewer `--tokens`.
"""

import json
import math
import shutil
import time
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from training.corpus import BOS, BOS_ID, batches, text_files, token_ids, train_tokenizer
from training.measure import bits_per_byte, induction

N_CTX = 256
N_ENTRIES = 4096


def build(name: str) -> nn.Module:
    """A model with random weights, N(0, 0.02) as in GPT-2.

    Raises:
        ValueError: If the recipe has no model of that name.
    """
    import transformers

    ids: dict[str, Any] = {"bos_token_id": BOS_ID, "eos_token_id": BOS_ID, "vocab_size": N_ENTRIES}
    if name == "books-gpt2":
        config = transformers.GPT2Config(
            n_positions=N_CTX, n_embd=192, n_layer=4, n_head=6, activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if name == "books-llama":
        config = transformers.LlamaConfig(
            hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=N_CTX, tie_word_embeddings=True,
            rms_norm_eps=1e-5, **ids,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    raise ValueError(f"`model` must be 'books-gpt2' or 'books-llama', got {name!r}.")


def optimizers(model: nn.Module, lr: float, muon: bool = True) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases; or AdamW for all."""
    if not muon:
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or ".layers." in n)]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def lr_factor(step: int, n_steps: int, warmup: int, decay: float) -> float:
    """Learning rate as a share of the highest: a ramp up, a plateau, a ramp down to zero."""
    return min(1.0, (step + 1) / warmup, (n_steps - step) / (decay * n_steps))


def save(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer], step: int) -> None:
    """Write a checkpoint beside the last one, then replace it."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt/{i}/{j}/{key}": torch.as_tensor(value) for key, value in state.items()}
    beside = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"step": str(step)})
    beside.rename(path)


def load(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint back into model and optimizers; returns the number of finished steps."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt/{i}/"):
                _, _, j, name = key.split("/")
                state.setdefault(int(j), {})[name] = value
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    return step


def write(model: nn.Module, folder: Path) -> None:
    """The weights in half precision, in Hugging Face layout."""
    copy = deepcopy(model).cpu().half()
    cast(Any, copy).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "gpt2":
        config["activation_function"] = "gelu_new"  # the same function under the name that all libraries know
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """A tokenizer beside a model, so that the folder is all that is needed."""
    import transformers

    special: Any = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), BOS)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def kept_steps(n_steps: int, n: int) -> set[int]:
    """So many steps to keep a model of: random weights, and then four times as many steps each time.

    Raises:
        ValueError: If there are too few steps for that, or one is asked for, which would be random or the last.
    """
    found = {0 if number == 0 else math.ceil(n_steps / 4 ** (n - 1 - number)) for number in range(n)}
    if n == 1 or len(found) < n:
        raise ValueError(
            f"`keep` must be 0, or at least 2 and few enough for different steps, got {n} for {n_steps} steps."
        )
    return found


def require_kept(folder: Path, kept: set[int], done: int) -> None:
    """Check that the models of a run that is taken up again are those that it should have kept by now.

    Raises:
        ValueError: If one is missing, or was kept by another schedule.
    """
    held = {int(path.name.split("-")[1]) for path in folder.glob("step-*")}
    wanted = {step for step in kept if step < done}
    if wanted <= held <= kept:
        return
    raise ValueError(
        f"`keep` and `tokens` must be those that the run was begun with: after {done} steps there should be models of "
        f"{sorted(wanted)}, got {sorted(held)} in {folder}. Start anew with another `out`."
    )


def main(
    folder: Annotated[Path, typer.Argument(help="A folder of UTF-8 text files.")],
    model: Annotated[str, typer.Option(help="books-gpt2 or books-llama")] = "books-gpt2",
    out: Annotated[Path, typer.Option(help="Where tokenizer, checkpoint and log are kept.")] = Path("runs"),
    pattern: Annotated[str, typer.Option(help="Which files to train on.")] = "train-*.txt",
    valid: Annotated[str, typer.Option(help="The file held out, if there is one.")] = "valid.txt",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use, not train.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on in all.")] = 40_000_000,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    decay: Annotated[float, typer.Option(help="Share of the run over which it falls.")] = 0.4,
    repeated: Annotated[float, typer.Option(help="Share of windows that repeat a segment.")] = 0.04,
    seed: Annotated[int, typer.Option(help="Fixes weights and order of the text.")] = 0,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Models to keep in steps/: those of 0, ..., 1/16, 1/4, all steps.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Compile the loss (needs a C compiler).")] = True,
    half: Annotated[bool, typer.Option(help="bfloat16 where that is precise enough; slow without hardware.")] = True,
    muon: Annotated[bool, typer.Option(help="Muon for matrices, in bfloat16; or AdamW for all.")] = True,
) -> None:
    """Train, with progress, checkpoints and resumption."""
    if threads:
        torch.set_num_threads(threads)
    n_steps, steps = math.ceil(tokens / (batch * N_CTX)), out / "steps"
    kept = kept_steps(n_steps, keep)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    files = text_files(folder, pattern)
    tokenizer_file = tokenizer or out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(files, N_ENTRIES).save(str(tokenizer_file))
    bpe = Tokenizer.from_file(str(tokenizer_file))
    ids = token_ids(bpe, files, out)
    held_out = folder / valid
    held_out_text = held_out.read_text(encoding="utf-8")[:100_000] if held_out.exists() else None

    net = build(model).to(device)
    opts = optimizers(net, lr, muon)
    checkpoint = out / "checkpoint.safetensors"
    done = load(checkpoint, net, opts) if checkpoint.exists() else 0
    if kept:
        require_kept(steps, kept, done)

    def loss_of(tokens: Tensor, counted: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            logits = net(tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        weight = counted[:, 1:].flatten().float()
        return (loss * weight).sum() / weight.sum()

    step_loss = torch.compile(loss_of) if compiled else loss_of
    stream = batches(ids, n_ctx=N_CTX, n_entries=N_ENTRIES, batch=batch, repeated=repeated, seed=seed, first_step=done)
    started, smooth = time.perf_counter(), float("nan")

    def keep_model(step: int) -> None:
        place = steps / f"step-{step:06d}"
        if step not in kept or place.exists():
            return
        beside = out / "steps.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        write(net, beside)
        write_tokenizer(bpe, beside)
        steps.mkdir(exist_ok=True)
        beside.rename(place)

    keep_model(done)
    bar = tqdm(range(done, n_steps), initial=done, total=n_steps, desc=model, mininterval=10)
    for step in bar:
        text, counted = (x.to(device) for x in next(stream))
        loss = step_loss(text, counted)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr * lr_factor(step, n_steps, 200, decay)
            opt.step()
            opt.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {step}; start again with a smaller `--lr`.")
        keep_model(step + 1)
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == n_steps:
            save(checkpoint, net, opts, step + 1)
            row = {"step": step + 1, "tokens": (step + 1) * batch * N_CTX, "loss": smooth}
            row["seconds"] = round(time.perf_counter() - started, 1)
            row["induction"] = induction(net.cpu(), N_ENTRIES, n_sequences=16)
            if held_out_text:
                row["bits_per_byte"] = bits_per_byte(net, bpe, held_out_text, N_CTX)
            net.to(device)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({k: row[k] for k in row}) + "\n")


if __name__ == "__main__":
    typer.run(main)
