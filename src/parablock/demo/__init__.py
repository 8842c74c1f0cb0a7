"""`parablock demo`: a small federated run that needs neither data nor a model.

material     word problems and a tiny Llama, made from a seed
quickstart   the run on them, and what it prints at the end
"""
