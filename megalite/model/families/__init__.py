"""The model families that come with megalite, a folder each: section `model`, layers, maps of other formats.

A folder's `FAMILY` says what the other packages need to know, and `model.registry` lists it. Nothing here imports torch
before a family's `builder` is called.
"""
