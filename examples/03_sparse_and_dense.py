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
# # Sparse and dense
#
# Some predictions need a few edges of a model, others half of them. Which, and where do they differ?
# The model is in the package, so this runs without a network.

# %%
import tracedensity as td

model = td.load_model("books-llama")
prompts = [
    "said the old man, and shook his",
    "It was the best of times, it was the worst of",
    "The king went to the window and the queen went to the",
    "Once upon a time there was a little",
]
curves = [td.density(model, prompt, baselines=False) for prompt in prompts]

# %% [markdown]
# ## Side by side
#
# Each curve is one prediction; below, how large a circuit each needs, the sparsest on top.

# %%
td.plot.plot_curves(curves)

# %% [markdown]
# A prediction that leaves much open is spread over many possible words, and all of them have to be kept: entropy is the
# first thing to look at. (Four prompts prove nothing: see the studies.)

# %%
for curve in sorted(curves, key=lambda curve: curve.minimal_size(0.9) / curve.n_edges):
    share = curve.minimal_size(0.9) / curve.n_edges
    print(f"{share:6.1%} of all edges, entropy {curve.entropy:.2f} nats: {curve.top_text!r}")

# %% [markdown]
# These sizes belong to one way to rank edges, and are upper bounds: a search finds smaller circuits.

# %%
tight = td.density(model, prompts[0], refine=True, budget=200, baselines=False)
tight.plot()

# %% [markdown]
# ## Where they differ
#
# Prompts of different lengths have different edges, but the same heads: what the circuit of the first uses, less
# what that of the last does, of the edges that each head has.

# %%
sparse, dense = (curves[i].circuit(faithfulness=0.8) for i in (0, 3))
td.plot.plot_heatmap(sparse, minus=dense)

# %% [markdown]
# Prompts of one length can be compared edge by edge: blue is only in the first circuit, orange only in the second.

# %%
young = td.density(model, "said the young man, and shook his", baselines=False).circuit(faithfulness=0.8)
old = td.density(model, "said the old man, and shook his", baselines=False).circuit(faithfulness=0.8)
td.plot.plot_difference(old, young, names=("old", "young"))

# %% [markdown]
# ## Along a text
#
# How much of the model does each word of a text need, given those before it? Rest the mouse on a word.

# %%
text = "The old man sat by the fire, and the child sat upon his knee"
n_tokens = len(td.capture(model, text, keep="z").tokens)
td.plot.density_strip([td.density(model, text, position=place, baselines=False) for place in range(1, n_tokens)])
