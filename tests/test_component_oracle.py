"""`component_oracle` against TransformerLens and against what must hold by definition."""

from typing import Any

import pytest
import torch
from component_oracle import (
    ComponentOracle,
    Shape,
    edge_name,
    ends,
    float64_copy,
    greedy,
    list_edges,
    list_readers,
    list_writers,
    log_probability,
    logit_difference,
    prune,
    writers_into,
)
from conftest import hooked_only, random_model
from torch import Tensor

ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 4}
GQA: dict[str, Any] = {"n_key_value_heads": 2}
LLAMA: dict[str, Any] = {"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", **ROTARY, **GQA}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "gpt2 folded": {"act_fn": "gelu_new", "normalization_type": "LNPre"},
    "gpt2 with a final RMS": {"act_fn": "gelu", "normalization_type": "LN", "final_rms": True},
    "llama": LLAMA,
    "llama folded": {**LLAMA, "normalization_type": "RMSPre", "rotary_base": 500},
    "adjacent pairs, half rotated": {**LLAMA, "rotary_adjacent_pairs": True, "d_head": 8},
    "no norm": {"act_fn": "relu", "normalization_type": None},
    "parallel": {"act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True, **ROTARY},
    "parallel grouped": {"act_fn": "silu", "normalization_type": "RMS", "parallel_attn_mlp": True, **GQA},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
    "scaled by layer": {"act_fn": "relu", "normalization_type": "LN", "scale_attn_by_inverse_layer_idx": True},
}
HOOKED_KINDS = ("parallel", "parallel grouped", "scaled by layer")  # none of which a native bridge has
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=hooked_only if kind in HOOKED_KINDS else ()) for kind in KINDS]
)
CLEAN, CORRUPTED = torch.tensor([3, 14, 15, 9, 2, 6]), torch.tensor([3, 5, 15, 8, 9, 7])
METRIC = log_probability(11)


def oracle_of(kind: str, ungroup: bool = False, **options: Any) -> ComponentOracle:
    return ComponentOracle(random_model(**KINDS[kind], **options), ungroup=ungroup)


def close(ours: Tensor | float, theirs: Tensor | float, tolerance: float = 1e-9) -> None:
    """Relative to the largest entry."""
    one, other = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


# -- the graph ---------------------------------------------------------------------------------------


def test_the_lists_of_a_small_graph():
    shape = Shape(n_layers=1, n_heads=2, n_groups=1)
    assert list_writers(shape) == ["input", "a0.h0", "a0.h1", "m0"]
    assert list_readers(shape) == ["a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m0", "logits"]
    assert list_edges(shape)[:5] == [f"input->{r}" for r in list_readers(shape)[:5]]
    assert list_edges(shape)[5:] == ["a0.h0->m0", "a0.h1->m0", *(f"{w}->logits" for w in list_writers(shape))]
    assert writers_into(shape._replace(parallel=True), "m0") == ["input"]
    assert list_readers(shape._replace(n_groups=2, has_mlp=False))[2:] == [
        *("a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "logits")
    ]


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_number_of_edges_is_that_of_the_formula(n_layers: int, n_groups: int, parallel: bool):
    per_layer = 4 + 2 * n_groups + 1
    before = n_layers + (4 + 1) * n_layers * (n_layers - 1) // 2
    expected = per_layer * before + (0 if parallel else n_layers * 4) + 1 + n_layers * (4 + 1)
    edges = list_edges(Shape(n_layers, 4, n_groups, parallel=parallel))
    assert len(edges) == len(set(edges)) == expected


def test_gpt2_small_has_as_many_edges_as_published():
    assert len(list_edges(Shape(12, 12, 12))) == 32491


def test_pruning_removes_dead_ends_and_sourceless_nodes_in_turn():
    shape = Shape(2, 2, 2)
    path = {"input->a0.h1<v>", "a0.h1->m1", "m1->logits"}
    dead_end = {"input->m0", "m0->a1.h0<q>"}
    sourceless = {"a0.h0->a1.h1<k>", "a1.h1->m1"}
    assert prune(shape, path | dead_end | sourceless) == path
    assert prune(shape, dead_end | sourceless) == set()
    assert prune(shape, list_edges(shape)) == set(list_edges(shape))
    assert prune(shape, {"input->logits"}) == {"input->logits"}


def test_pruning_keeps_a_group_while_one_of_its_heads_lives():
    shape = Shape(1, 4, 2)
    shared = {"input->a0.kv1<k>", "a0.h3->logits"}
    assert prune(shape, shared | {"input->a0.h2<q>", "input->a0.kv0<v>"}) == shared
    assert prune(shape, {"input->a0.kv1<k>", "a0.h0->logits"}) == set()


def test_greedy_grows_from_the_logits():
    shape = Shape(1, 2, 1)
    scores = dict.fromkeys(list_edges(shape), 0.0)
    scores |= {"input->a0.kv0<k>": 9, "a0.h0->m0": 5, "m0->logits": 1, "input->logits": 2, "input->a0.h1<q>": 8}
    assert greedy(shape, scores, 4) == ["input->logits", "m0->logits", "a0.h0->m0", "input->a0.kv0<k>"]
    # Zeros from here on, in the order of the list; a0.h1 is reached by the second of them.
    assert greedy(shape, scores, 8)[4:] == ["input->a0.h0<q>", "input->a0.kv0<v>", "input->m0", "a0.h1->m0"]
    assert greedy(shape, scores, 9)[8] == "input->a0.h1<q>"
    assert sorted(greedy(shape, scores, 99)) == sorted(list_edges(shape))


# -- the forward pass --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("ungroup", [False, True])
def test_the_plain_run_is_that_of_transformer_lens(kind: str, ungroup: bool):
    model = float64_copy(random_model(**KINDS[kind]))
    oracle = ComponentOracle(model, ungroup)
    logits, writers = oracle.run(CLEAN)
    with torch.no_grad():
        expected, cache = model.run_with_cache(CLEAN[None])
    assert expected.dtype == torch.float64
    close(logits, expected[0, -1])
    close(writers["input"], cache["hook_embed"][0])
    for layer in range(model.cfg.n_layers):
        z = cache[f"blocks.{layer}.attn.hook_z"][0]
        for head in range(model.cfg.n_heads):
            close(writers[f"a{layer}.h{head}"], z[:, head] @ model.blocks[layer].attn.W_O[head].detach())
        if not model.cfg.attn_only:
            close(writers[f"m{layer}"], cache[f"blocks.{layer}.hook_mlp_out"][0])
    close(oracle.forward(CLEAN).readers["logits"], cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0])


@every_kind
def test_all_edges_give_the_clean_run_and_none_the_corrupted_one(kind: str):
    oracle = oracle_of(kind)
    ablated = oracle.corrupted_values(CORRUPTED)
    clean, corrupted = oracle.run(CLEAN)[0], oracle.run(CORRUPTED)[0]
    assert (clean - corrupted).abs().max() > 0.01
    close(oracle.run(CLEAN, oracle.edges, ablated)[0], clean)
    close(oracle.run(CLEAN, [], ablated)[0], corrupted)


def test_positions_of_edges_can_be_kept_one_by_one():
    oracle = oracle_of("llama")
    ablated = oracle.corrupted_values(CORRUPTED)
    some = oracle.edges[::3]
    everywhere = [(*ends(edge), pos) for edge in some for pos in range(len(CLEAN))]
    close(oracle.run_positions(CLEAN, everywhere, ablated)[0], oracle.run(CLEAN, some, ablated)[0])
    # Into the logits only the last position matters, and the first tokens are the same.
    unread = [triple for triple in everywhere if triple[1] != "logits" or triple[2] == len(CLEAN) - 1]
    unread = [triple for triple in unread if triple[0] != "input" or triple[2] != 0]
    close(oracle.run_positions(CLEAN, unread, ablated)[0], oracle.run(CLEAN, some, ablated)[0])
    fewer = [triple for triple in everywhere if triple[2] != 1]
    assert (oracle.run_positions(CLEAN, fewer, ablated)[0] - oracle.run(CLEAN, some, ablated)[0]).abs().max() > 1e-4


def test_ungrouped_copies_together_are_the_shared_edge():
    grouped, ungrouped = oracle_of("llama"), oracle_of("llama", ungroup=True)
    ablated = grouped.corrupted_values(CORRUPTED)
    cut = {"input->a1.kv1<k>", "m0->a1.kv0<v>"}
    copies = {f"input->a1.h{h}<k>" for h in (2, 3)} | {f"m0->a1.h{h}<v>" for h in (0, 1)}
    one = grouped.run(CLEAN, set(grouped.edges) - cut, ablated)[0]
    close(one, ungrouped.run(CLEAN, set(ungrouped.edges) - copies, ablated)[0])
    scores, split = grouped.eap(CLEAN, ablated, METRIC), ungrouped.eap(CLEAN, ablated, METRIC)
    close(scores["input->a1.kv1<k>"], split["input->a1.h2<k>"] + split["input->a1.h3<k>"])


def test_means_are_over_prompts_and_positions():
    oracle = oracle_of("gpt2")
    one, two = oracle.run(CLEAN)[1]["m1"], oracle.run(CORRUPTED[:3])[1]["m1"]
    mean = oracle.mean_values([CLEAN, CORRUPTED[:3]], n_pos=4)["m1"]
    assert mean.shape == (4, 16)
    close(mean[3], (one.sum(0) + two.sum(0)) / 9)
    by_position = oracle.mean_positional_values([CLEAN, CORRUPTED])["a0.h1"]
    close(by_position, (oracle.run(CLEAN)[1]["a0.h1"] + oracle.run(CORRUPTED)[1]["a0.h1"]) / 2)
    assert oracle.zero_values(3)["input"].abs().sum() == 0


# -- scores ------------------------------------------------------------------------------------------


@hooked_only
@pytest.mark.parametrize(
    ("kind", "ungroup"), [("gpt2", False), ("llama", False), ("llama", True), ("parallel grouped", True)]
)
def test_reader_gradients_are_those_of_transformer_lens(kind: str, ungroup: bool):
    model = float64_copy(random_model(**KINDS[kind]))
    ours = ComponentOracle(model, ungroup).gradients(CLEAN, METRIC)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.set_ungroup_grouped_query_attention(ungroup and model.cfg.n_key_value_heads is not None)
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        seen[hook.name] = value

    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_{x}" for layer in layers for x in ("q_input", "k_input", "v_input", "mlp_in")]
    names.append(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    METRIC(model.run_with_hooks(CLEAN[None], fwd_hooks=[(name, keep) for name in names])[0, -1]).backward()
    theirs = {}
    for layer in layers:
        for letter in "qkv":
            gradient = seen[f"blocks.{layer}.hook_{letter}_input"].grad[0]
            owner = "h" if gradient.shape[1] == model.cfg.n_heads else "kv"
            for index in range(gradient.shape[1]):
                theirs[f"a{layer}.{owner}{index}<{letter}>"] = gradient[:, index]
        theirs[f"m{layer}"] = seen[f"blocks.{layer}.hook_mlp_in"].grad[0]
    theirs["logits"] = seen[names[-1]].grad[0]
    assert theirs.keys() == ours.keys()
    for reader in ours:
        assert theirs[reader].abs().max() > 1e-6
        close(ours[reader] / theirs[reader].abs().max(), theirs[reader] / theirs[reader].abs().max())


@every_kind
def test_scores_into_a_reader_sum_to_the_change_of_its_input(kind: str):
    oracle = oracle_of(kind)
    scores = oracle.eap(CLEAN, oracle.corrupted_values(CORRUPTED), METRIC)
    gradients = oracle.gradients(CLEAN, METRIC)
    clean, corrupted = oracle.forward(CLEAN).readers, oracle.forward(CORRUPTED).readers
    for reader in oracle.readers:
        expected = float(((corrupted[reader] - clean[reader]) * gradients[reader]).sum())
        close(sum(scores[edge_name(writer, reader)] for writer in writers_into(oracle.shape, reader)), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama", pytest.param("parallel", marks=hooked_only)])
def test_a_tiny_change_of_one_edge_is_its_score(kind: str):
    oracle = oracle_of(kind)
    clean, corrupted = oracle.run(CLEAN)[1], oracle.corrupted_values(CORRUPTED)
    step = 1e-5
    ahead = {writer: z + step * (corrupted[writer] - z) for writer, z in clean.items()}
    behind = {writer: z - step * (corrupted[writer] - z) for writer, z in clean.items()}
    scores = oracle.eap(CLEAN, corrupted, METRIC)
    there, back = oracle.exact(CLEAN, ahead, METRIC), oracle.exact(CLEAN, behind, METRIC)
    assert scores.keys() == there.keys() == set(oracle.edges)
    largest = max(map(abs, scores.values()))
    for edge, score in scores.items():
        assert abs((there[edge] - back[edge]) / (2 * step) - score) < 1e-7 * largest


def test_scores_of_positions_sum_to_the_score():
    oracle = oracle_of("gpt2")
    ablated = oracle.zero_values(len(CLEAN))
    by_position, scores = oracle.eap_positions(CLEAN, ablated, METRIC), oracle.eap(CLEAN, ablated, METRIC)
    for edge in oracle.edges:
        assert by_position[edge].shape == CLEAN.shape
        close(by_position[edge].sum(), scores[edge])
        if edge.endswith("->logits"):
            assert by_position[edge][:-1].abs().max() == 0


def test_integrated_gradients_sum_to_the_difference_of_the_ends():
    oracle = oracle_of("gpt2", n_layers=1)
    ablated = oracle.corrupted_values(CORRUPTED)
    whole = float(METRIC(oracle.run(CORRUPTED)[0]) - METRIC(oracle.run(CLEAN)[0]))

    def missing(steps: int) -> float:
        scores = oracle.eap_ig_inputs(CLEAN, ablated, METRIC, steps)
        return abs(sum(scores[edge] for edge in oracle.edges if edge.startswith("input->")) - whole)

    assert missing(80) < 0.3 * missing(20) and missing(80) < 0.05 * abs(whole)


def test_the_ends_of_the_integral():
    oracle = oracle_of("llama")
    ablated = oracle.corrupted_values(CORRUPTED)
    here, there = oracle.gradients(CLEAN, METRIC), oracle.gradients(CORRUPTED, METRIC)
    one_step = oracle.ig_input_gradients(CLEAN, ablated, METRIC, 1)
    both = oracle.clean_corrupted_gradients(CLEAN, ablated, METRIC)
    for reader in oracle.readers:
        close(one_step[reader], there[reader])
        close(both[reader], (here[reader] + there[reader]) / 2)
    close(
        oracle.clean_corrupted(CLEAN, ablated, METRIC)["m0->logits"],
        float(((ablated["m0"] - oracle.run(CLEAN)[1]["m0"]) * both["logits"]).sum()),
    )


def test_interpolated_activations_at_one_step_are_the_clean_ones():
    """Then each group only blocks the gradient of what lies before it."""
    oracle = oracle_of("gpt2")
    plain = oracle.gradients(CLEAN, METRIC)
    found = oracle.ig_activation_gradients(CLEAN, oracle.corrupted_values(CORRUPTED), METRIC, 1)
    assert oracle.groups()[:3] == [["input"], ["a0.h0", "a0.h1", "a0.h2", "a0.h3"], ["m0"]]
    close(found["logits"], plain["logits"])
    # The last MLP's input is behind all groups but its own, which cuts it off; nothing else is between it and the end.
    close(found["m1"], plain["m1"] * (len(oracle.groups()) - 1) / len(oracle.groups()))


def test_a_replaced_group_is_one_whose_edges_are_all_ablated():
    oracle = oracle_of("llama")
    ablated = oracle.corrupted_values(CORRUPTED)
    for group in oracle.groups():
        kept = [edge for edge in oracle.edges if ends(edge)[0] not in group]
        replaced = oracle.forward(CLEAN, replaced={writer: ablated[writer] for writer in group})
        close(replaced.logits, oracle.run(CLEAN, kept, ablated)[0])


def test_interpolated_activations_are_the_mean_over_steps_and_groups():
    """Into the logits only what is written matters, so every run can be had from a circuit."""
    oracle = oracle_of("llama")
    clean, corrupted = oracle.run(CLEAN)[1], oracle.corrupted_values(CORRUPTED)
    found = oracle.ig_activation_gradients(CLEAN, corrupted, METRIC, 2)["logits"]
    runs = []
    for group in oracle.groups():
        kept = [edge for edge in oracle.edges if ends(edge)[0] not in group]
        half = {writer: (clean[writer] + corrupted[writer]) / 2 for writer in oracle.writers}
        for values in (clean, half):
            written = oracle.run(CLEAN, kept, values)[1] | {writer: values[writer] for writer in group}
            stream = oracle.constants("logits", len(CLEAN)) + torch.stack(list(written.values())).sum(0)
            stream.requires_grad_()
            U, b = oracle.weights["unembed.W_U"], oracle.weights["unembed.b_U"]
            METRIC(oracle.norm(stream, "ln_final")[-1] @ U + b).backward()
            runs.append(stream.grad)
    close(found, torch.stack(runs).mean(0))


def test_flow_is_a_share():
    oracle = oracle_of("gpt2")
    scores = oracle.flow(CLEAN)
    for reader in oracle.readers:
        total = sum(scores[edge_name(writer, reader)] for writer in writers_into(oracle.shape, reader))
        assert total == pytest.approx(1)
    assert min(scores.values()) >= 0
    trace = oracle.forward(CLEAN)
    y = trace.readers["logits"][-1]
    near = {w: max(0.0, float(y.abs().sum() - (y - z[-1]).abs().sum())) for w, z in trace.writers.items()}
    assert scores["m0->logits"] == pytest.approx(near["m0"] / sum(near.values()))


def test_magnitude_is_the_norm_of_the_change():
    oracle = oracle_of("gpt2")
    scores = oracle.magnitude(CLEAN, oracle.zero_values(len(CLEAN)))
    norms = oracle.run(CLEAN)[1]["m0"].norm(dim=-1)
    assert scores["m0->a1.h2<k>"] == pytest.approx(float(norms.sum()))
    assert scores["m0->logits"] == pytest.approx(float(norms[-1]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_neurons_of_an_mlp_sum_to_its_edge(kind: str):
    oracle = oracle_of(kind)
    neurons = oracle.neuron_scores(CLEAN, CORRUPTED, METRIC)
    scores = oracle.eap(CLEAN, oracle.corrupted_values(CORRUPTED), METRIC)
    edges = [edge for edge in oracle.edges if edge.startswith("m")]
    assert len(neurons) == 24 * len(edges)
    for edge in edges:
        writer, reader = ends(edge)
        close(sum(neurons[int(writer[1:]), neuron, reader] for neuron in range(24)), scores[edge])


def test_no_change_scores_nothing():
    oracle = oracle_of("llama")
    same = oracle.corrupted_values(CLEAN)
    metric = logit_difference(4, 7)
    for scores in (
        oracle.eap(CLEAN, same, metric),
        oracle.eap_ig_inputs(CLEAN, same, metric, 2),
        oracle.clean_corrupted(CLEAN, same, metric),
        oracle.eap_ig_activations(CLEAN, same, metric, 1),
        oracle.exact(CLEAN, same, metric),
        oracle.magnitude(CLEAN, same),
    ):
        assert set(scores) == set(oracle.edges)
        assert max(map(abs, scores.values())) < 1e-12
