//! Reads from model files: submit, then reap completions.
