"""The knobs of the program (`schema.py`, set by the YAML files), sizes of encoders, and the table of data sets."""
