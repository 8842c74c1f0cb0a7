"""The configuration of a run: its keys, the methods, and the checks of both.

keys        every key with its default and its description
data_section  the keys of `data`
methods     the methods, a row of traits each
conflicts   settings that cannot work together
load        YAML files, `--set`, and all problems at once
section     the base class of all sections, and the section of a fault
"""
