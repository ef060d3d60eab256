//! Cuts a file at its document markers.
//!
//! A line that begins with `---` or `...` is a marker wherever it stands: YAML 1.2.2 (rule 206,
//! `c-forbidden`) allows it neither in block scalars nor in quoted ones. So the cut needs no parsing.

/// The text of one document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk<'a> {
    /// From its marker (or the directives before it) up to the next.
    pub(super) text: &'a str,
    /// The file's line (from 1) on which `text` begins.
    pub(super) first_line: usize,
}

/// The documents of `text`, in order, empty ones included.
pub(super) fn documents(text: &str) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut start_line = 1;
    let mut offset = 0;
    let mut only_directives = true;
    for (index, line) in lines(text).enumerate() {
        let line_number = index + 1;
        if is_marker(line, "---") && !only_directives {
            chunks.push(Chunk {
                text: &text[start..offset],
                first_line: start_line,
            });
            (start, start_line) = (offset, line_number);
        }
        offset += line.len();
        if is_marker(line, "...") {
            chunks.push(Chunk {
                text: &text[start..offset],
                first_line: start_line,
            });
            (start, start_line) = (offset, line_number + 1);
            only_directives = true;
        } else if !is_preamble(line) {
            only_directives = false;
        }
    }
    chunks.push(Chunk {
        text: &text[start..],
        first_line: start_line,
    });
    chunks
}

/// The lines of `text`, each with its line break (`\n`, `\r\n` or `\r`).
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = match rest.find(['\n', '\r']) {
            Some(at) if rest[at..].starts_with("\r\n") => at + 2,
            Some(at) => at + 1,
            None => rest.len(),
        };
        let (line, after) = rest.split_at(end);
        rest = after;
        Some(line)
    })
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']))
}

/// Whether `line` may stand before a document's own marker: a directive, a comment or nothing.
fn is_preamble(line: &str) -> bool {
    let content = line.trim_start();
    content.is_empty() || content.starts_with('#') || line.starts_with('%')
}
