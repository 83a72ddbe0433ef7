"""The words of small runs."""

DATES = ["task.train_rows=48", "task.validation_rows=8", "task.test_rows=8", "trainer=smoke", "trainer.progress=false"]
TRACKED = [*DATES, "tracker=wandb_tensorboard", "tracker.mode=offline", "trainer.log_every=1", "trainer.eval_every=1"]
