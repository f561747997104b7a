"""A checkpoint as a folder that the transformers library loads, with the code of the model beside the weights.

`configuration_exlm.py`, `graph_exlm.py` and `modeling_exlm.py` are never imported here: they are copied into the folder
and run there, on torch and transformers alone.
"""
