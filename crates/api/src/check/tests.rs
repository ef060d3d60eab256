//! Tests of the checks between objects.
