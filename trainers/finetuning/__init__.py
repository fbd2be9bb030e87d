"""Fine-tuning on labelled cases: from plan, weights and cases to Dice."""
