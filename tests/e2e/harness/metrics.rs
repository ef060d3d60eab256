//! What a node's agent counts, read from the mesh's API as a scraper would.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use super::{EDIT_PATIENCE, Mesh, leftovers, until};

impl Mesh {
    /// A counter's value; 0 if it has not counted yet. `labels` are such as `status="400"`, in any order.
    pub(crate) fn metric(&self, node: &str, name: &str, labels: &[&str]) -> u64 {
        let text = self.metrics(node);
        let of_series = text.lines().filter(|line| {
            let named = line.strip_prefix(name);
            named.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        let values = of_series.map(|line| line.rsplit(' ').next().unwrap());
        values.map(|value| value.parse::<u64>().unwrap()).sum()
    }

    /// Waits until a counter has counted beyond `before`.
    #[track_caller]
    pub(crate) fn until_counted(&self, node: &str, name: &str, labels: &[&str], before: u64) {
        let what = format!("{name} {labels:?} of {node} is more than {before}");
        until(&what, EDIT_PATIENCE, || {
            match self.metric(node, name, labels) {
                now if now > before => Ok(()),
                _ => Err(self.metrics(node)),
            }
        });
    }

    fn metrics(&self, node: &str) -> String {
        let socket = leftovers::run_dir(self.name()).join("api.sock");
        let mut stream = UnixStream::connect(socket).unwrap();
        write!(stream, "GET /v1/metrics?node={node} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(" 200 "), "{answer}");
        body.to_owned()
    }
}
