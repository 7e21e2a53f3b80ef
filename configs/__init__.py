"""The knobs of the program: `schema.py` documents and checks them, the YAML files set them."""
