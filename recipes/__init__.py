"""nemo-run recipes: functions that return one complete, typed configuration of a run.

`recipes.registry` lists them; `recipes.entrypoints` makes them known to the `nemo` command. Frameworks are imported
inside the functions, so that listing recipes and starting `nemo` stay quick.
"""
