"""The main job: a small GPT trained under HSDP, killed in the middle of a save and resumed.

``train`` is an ordinary training script for torch's own launcher; ``run`` is the demo that starts,
kills and resumes it."""
