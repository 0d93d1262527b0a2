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
# # Circuits of a task
#
# From pairs of prompts to a drawn circuit: which heads and MLPs make a small language model follow
# *son* with *his* and *aunt* with *her*? The model is in the package, so this runs without a network.

# %%
import tracedensity as td

model = td.load_model("books-gpt2")
task = td.tasks.pronoun(model, n=32, solved=True)
task.to_dataframe().head()

# %% [markdown]
# How well the model does, and how much of it that takes: edges are scored by integrated gradients between the
# corrupted and the clean embedding, ordered, and circuits of all sizes are run.

# %%
print(task.solved(model))
curve = td.density(model, task, graph="component", method="eap-ig")
curve

# %%
curve.plot()

# %% [markdown]
# ## The circuit
#
# The smallest circuit of this family that recovers 90% of the logit difference. Every absent edge carries what it
# carries on the corrupted prompt. Edges have the colour of what they are read as, and the width of their score.

# %%
scores = td.attribute(model, task, graph="component", method="eap-ig")
circuit = curve.circuit(faithfulness=0.9)
assert circuit.verify(model).faithfulness >= 0.9
circuit.plot(scores)

# %% [markdown]
# How important all edges are that each head and MLP writes:

# %%
scores.plot()

# %% [markdown]
# ## Two methods
#
# Plain edge attribution patching takes gradients at the clean prompts only. Where do the two circuits differ?

# %%
other = td.attribute(model, task, graph="component", method="eap").rank().circuit(circuit.n_edges)
td.plot.plot_difference(circuit, other, names=("eap-ig", "eap"), scores=scores)

# %%
td.plot.plot_curves(
    {
        "eap-ig": curve,
        "eap": td.density(model, task, graph="component", method="eap"),
    }
)

# %% [markdown]
# ## Is every edge needed?
#
# What each edge is worth, least needed first; and whether the rest of the model could do without.

# %%
print(td.completeness(model, circuit))
td.minimality(model, circuit).head()
