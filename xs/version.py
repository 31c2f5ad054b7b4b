"""The version of xs, in the one place that everything else takes it from."""

VERSION = "0.1.0"
