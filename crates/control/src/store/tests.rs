//! Files that change, break, move and vanish.

use super::*;

fn account(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, labels: {{v: '1'}}}}\n"
    )
}

fn labelled(name: &str, version: &str) -> String {
    account(name).replace("'1'", &format!("'{version}'"))
}

fn scan(files: &[(&str, &str)]) -> Scan {
    Scan {
        files: files
            .iter()
            .map(|(path, text)| (PathBuf::from(path), Ok((*text).to_owned())))
            .collect(),
        incomplete: Vec::new(),
    }
}

/// Name, version, and whether it is an earlier one than is written.
fn state(store: &Store) -> Vec<(String, String, bool)> {
    store
        .effective()
        .values()
        .map(|effective| {
            let metadata = effective.located.object.metadata();
            (
                metadata.name.clone(),
                metadata.labels["v"].clone(),
                effective.is_stale,
            )
        })
        .collect()
}

fn is(name: &str, version: &str, stale: bool) -> (String, String, bool) {
    (name.to_owned(), version.to_owned(), stale)
}

#[test]
fn a_wrong_document_keeps_its_last_good_version_and_touches_no_other() {
    let mut store = Store::default();
    let both = |a: &str, b: &str| format!("{a}---\n{b}");
    assert!(store.apply(&scan(&[("f.yaml", &both(&account("a"), &account("b")))])));
    let wrong = labelled("a", "2").replace("labels", "lables");
    let text = both(&wrong, &labelled("b", "2"));
    assert!(store.apply(&scan(&[("f.yaml", &text)])));
    assert_eq!(state(&store), [is("a", "1", true), is("b", "2", false)]);
    let problems = store.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert_eq!(
        problems[0].object,
        Some(ObjectRef::new("ServiceAccount", "default", "a"))
    );
    assert!(!store.apply(&scan(&[("f.yaml", &text)])), "said once");
    // Mended, then removed.
    store.apply(&scan(&[(
        "f.yaml",
        &both(&labelled("a", "3"), &account("b")),
    )]));
    assert_eq!(state(&store), [is("a", "3", false), is("b", "1", false)]);
    assert_eq!(store.problems(), []);
    store.apply(&scan(&[("f.yaml", &account("b"))]));
    assert_eq!(state(&store), [is("b", "1", false)]);
}

#[test]
fn a_half_written_file_keeps_everything_that_it_held() {
    let mut store = Store::default();
    let text = format!("{}---\n{}", account("a"), account("b"));
    store.apply(&scan(&[("f.yaml", &text), ("g.yaml", &account("c"))]));
    let half = format!("{}---\napiVersion: v1\nkind: Serv", labelled("a", "2"));
    store.apply(&scan(&[("f.yaml", &half), ("g.yaml", &account("c"))]));
    assert_eq!(
        state(&store),
        [is("a", "2", false), is("b", "1", true), is("c", "1", false)]
    );
}

#[test]
fn a_file_that_is_gone_takes_its_objects_along() {
    let mut store = Store::default();
    store.apply(&scan(&[
        ("f.yaml", &account("a")),
        ("g.yaml", &account("b")),
    ]));
    store.apply(&scan(&[("g.yaml", &account("b"))]));
    assert_eq!(state(&store), [is("b", "1", false)]);
}

#[test]
fn what_cannot_be_read_is_kept() {
    let mut store = Store::default();
    let good = scan(&[("f.yaml", &account("a"))]);
    store.apply(&good);
    let unreadable = Scan {
        files: [(
            PathBuf::from("f.yaml"),
            Err("cannot be read: no".to_owned()),
        )]
        .into(),
        incomplete: Vec::new(),
    };
    assert!(store.apply(&unreadable));
    assert!(!store.apply(&unreadable));
    assert_eq!(state(&store), [is("a", "1", true)]);
    let folder_gone = Scan {
        files: BTreeMap::new(),
        incomplete: vec![(PathBuf::from("."), "cannot be read: gone".to_owned())],
    };
    assert!(store.apply(&folder_gone));
    assert_eq!(state(&store).len(), 1);
    assert_eq!(store.problems().len(), 2);
    assert!(store.apply(&good));
    assert_eq!(state(&store), [is("a", "1", false)]);
    assert_eq!(store.problems(), []);
}

#[test]
fn of_two_files_with_one_object_the_first_in_effect_stays() {
    let mut store = Store::default();
    store.apply(&scan(&[("g.yaml", &labelled("a", "first"))]));
    let second = labelled("a", "second");
    store.apply(&scan(&[
        ("f.yaml", &second),
        ("g.yaml", &labelled("a", "first")),
    ]));
    assert_eq!(state(&store), [is("a", "first", false)]);
    assert_eq!(
        store.all_located().len(),
        2,
        "the check between objects sees both"
    );
    // It moved to the other file for good.
    store.apply(&scan(&[("f.yaml", &second)]));
    assert_eq!(state(&store), [is("a", "second", false)]);
}
