//! One metric registry with bounded series, shared by every process of the mesh.
