# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
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
# # One prompt
#
# *said the old man, and shook his* ... How much of a small language model does it take to say *head*, which part of it,
# and from which words does it know? The model is in the package, so this runs without a network.

# %%
import tracedensity as td

model = td.load_model("books-llama")
prompt = "said the old man, and shook his"
curve = td.density(model, prompt)
curve

# %% [markdown]
# ## The density curve
#
# Circuits of every size are cut out of the model and *run*. A random subgraph needs nearly all edges to say the same,
# and the model without the circuit says something else.

# %%
curve.plot()

# %% [markdown]
# ## The circuit
#
# Tokens across, layers up. The smallest circuit that keeps 90% of the prediction reads three of ten tokens. Move the
# slider to see it grow; rest the mouse on a line to read which head it is, and what it says by itself, read off
# through the unembedding.

# %%
scores = td.attribute(model, prompt)
circuit = curve.circuit(faithfulness=0.9)
curve.plot_circuits(scores, tokens=td.top_tokens(model, curve.circuit(size=114)), max_edges=114)

# %% [markdown]
# It is a claim that anybody can run again.

# %%
assert circuit.verify(model).faithfulness >= 0.9
circuit

# %% [markdown]
# ## What circuits are made of
#
# The first edges are skip connections and MLPs of the last token; most of the model's edges are heads, few of which are
# needed here.

# %%
curve.plot_composition()

# %% [markdown]
# ## Which heads
#
# What each head and MLP of the circuit is worth, by running the circuit without it.

# %%
td.minimality(model, circuit, by="node").iloc[::-1].head(6)

# %% [markdown]
# When heads enter, if edges enter one by one: dark ones are in small circuits.

# %%
curve.ranking.plot()

# %% [markdown]
# ## Where the information comes from
#
# How faithful the circuit is without the embedding of each token that it reads. (`td.trace_flow` says what the scores
# say of that.)

# %%
for row in td.minimality(model, circuit, by="token").itertuples():
    print(f"{row.faithfulness:6.3f} without {curve.provenance.texts[row.token]!r}")

# %% [markdown]
# And how early each token's states enter, sublayer by sublayer:

# %%
curve.ranking.plot(over="token")

# %% [markdown]
# ## Inside
#
# What the heads that write most attend to, and the neurons that write most.

# %%
activations = td.capture(model, prompt)
activations.plot(n=4)

# %%
activations.top_neurons(8).plot()

# %% [markdown]
# All of this on one page: `td.report(model, prompt).save("report.html")`, or on the command line
# `tracedensity report "said the old man, and shook his" --model books-llama`.
