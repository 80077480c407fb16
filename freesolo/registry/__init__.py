"""Models by name: registered versions, the aliases `candidate` and `champion`, and weights by any kind of reference.

A version holds our model file (`freesolo.models.model_file`) and the code that serves it, so that both the next stage
(`weights.resolve_weights`) and `mlflow models serve` can use it. `candidate` is the newest version (`versions`);
`champion` is the best one, moved by an evaluation and by nothing else (`champion`).
"""
