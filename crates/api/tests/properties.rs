//! Whatever a file holds, reading it neither panics nor points outside of the file.

use std::path::Path;

use api::{check::cross_check, mesh::MeshConfig, parse};
use proptest::{collection::vec, prelude::*};

const SHOP: &str = include_str!("shop.yaml");

/// Pieces of text that mean something in YAML, to get deeper than noise does.
const PIECES: [&str; 34] = [
    "apiVersion: v1\n",
    "kind: Service\n",
    "kind: Workload\n",
    "metadata:\n",
    "  name: a\n",
    "spec:\n",
    "  ports:\n",
    "- ",
    "  - ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "&a ",
    "*a",
    "!!str ",
    "!x ",
    "|\n",
    ">-\n",
    "'",
    "\"",
    "\\u0041",
    "#",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "\t",
    "\r",
    "\u{feff}",
    "é",
    "\u{0}",
];

/// Checks what must hold for any text.
fn holds(text: &str) -> Result<(), TestCaseError> {
    let parsed = parse(Path::new("any.yaml"), text);
    let problems = cross_check(&parsed.objects, &MeshConfig::default());
    // As in YAML: a line ends with \n, \r\n or \r. One more line begins after the last end.
    let unified = text.replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<&str> = unified.split('\n').collect();
    for problem in parsed.problems.iter().chain(&problems) {
        let (line, column) = (problem.line, problem.column);
        prop_assert!((1..=lines.len()).contains(&line), "{problem} of {text:?}");
        let width = lines[line - 1].chars().count();
        prop_assert!((1..=width + 1).contains(&column), "{problem} of {text:?}");
    }
    for located in &parsed.objects {
        prop_assert!(located.position("kind").is_some());
        prop_assert!((1..=lines.len()).contains(&located.source.line));
    }
    Ok(())
}

/// `SHOP` with the characters from `start` on, `length` of them, replaced.
fn mutated(start: usize, length: usize, replacement: &str) -> String {
    let characters: Vec<char> = SHOP.chars().collect();
    let start = start % characters.len();
    let end = (start + length).min(characters.len());
    let mut text: String = characters[..start].iter().collect();
    text.push_str(replacement);
    text.extend(&characters[end..]);
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in "\\PC{0,200}") {
        holds(&text)?;
    }

    #[test]
    fn any_characters(characters in vec(any::<char>(), 0..200)) {
        holds(&characters.into_iter().collect::<String>())?;
    }

    #[test]
    fn yaml_in_pieces(pieces in vec(prop::sample::select(&PIECES[..]), 0..40)) {
        holds(&pieces.concat())?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn mutated_documents(
        start in any::<usize>(),
        length in 0..40_usize,
        pieces in vec(prop::sample::select(&PIECES[..]), 0..4),
    ) {
        holds(&mutated(start, length, &pieces.concat()))?;
    }
}
