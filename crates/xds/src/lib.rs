//! Delta xDS client and server, its resource cache, and the messages of the workload API.
