# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look
#
# How much of a small language model does one prediction need?
# The model is in the package, so this runs without a network.

# %%
import tracedensity as td

model = td.load_model("books-llama")
curve = td.density(model, "said the old man, and shook his")
curve

# %% [markdown]
# The curve: faithfulness of the circuit of each size, on a log axis, beside a random and the inverse circuit.

# %%
curve.plot()

# %% [markdown]
# The smallest circuit that keeps 90% of the prediction. It is a claim that can be run again.

# %%
circuit = curve.circuit(faithfulness=0.9)
print(circuit, circuit.composition())
assert circuit.verify(model).faithfulness >= 0.9
circuit.plot()

# %% [markdown]
# A prediction that leaves more open needs more of the network.
# Sizes are upper bounds: each belongs to one way to rank edges.

# %%
open_ended = td.density(model, "Once upon a time there was a little")
for each in (curve, open_ended):
    print(
        f"{each.provenance.prompt!r}: entropy {each.entropy:.2f} nats, {each.minimal_size(0.9)} of {each.n_edges} edges"
    )

# %% [markdown]
# What the heads in the circuit do: attention of one of them, and the heads that write most at the last token.

# %%
activations = td.capture(model, "said the old man, and shook his", keep=["pattern", "z"])
heads = circuit.to_dataframe().query("kind == 'head'")
first = heads.iloc[0]
pattern = activations.get("pattern", layer=int(first["layer"]), head=int(first["head"]))
print(first["edge"], "attends with", float(pattern[int(first["dest"]), int(first["src"])]))
activations.top_heads(5)
