"""What judges say of answers: templates of models that judge, their verdicts, how they agree."""
