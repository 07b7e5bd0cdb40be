"""Video with known actions, camera poses and captions: a driven car, a robot arm, and the clips packages carry.

`collect.collect` is the entry point; it runs `street.roll_out` and `arm.roll_out` in worker processes and hands every
rollout to `writer.write_rollout`.
"""
