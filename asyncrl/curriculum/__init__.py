"""Choices that a config may name: which rows come how often (`samplers`), which finished groups are dropped
(`filters`), which of more responses than a group has belong to it (`choices`).

None of them can break the bound: a sampler says which row a group is for, once admission has said that there
may be one; what a filter drops gives its place back; a choice is made before the group is handed in.
"""
