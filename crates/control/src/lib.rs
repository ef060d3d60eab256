//! The control plane: sources, model, compilation, xDS, object status.
