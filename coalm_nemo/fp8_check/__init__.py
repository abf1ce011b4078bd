"""The paired gate: what a run's FP8 costs against the same run without it (`coalm fp8-check`)."""
