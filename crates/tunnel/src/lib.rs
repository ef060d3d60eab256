//! HBONE, the tunnel between nodes: each carried TCP connection is one HTTP/2 `CONNECT` stream over mutual TLS.
