//! What docs/delivery.md says of the tests is true: every test that it names exists.

use std::path::Path;

use flotilla_tests::repository;

/// The text of all Rust files below `dir`.
fn sources(dir: &Path, text: &mut String) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_test_that_the_table_of_faults_names_exists() {
    let mut code = String::new();
    for dir in ["crates", "tests"] {
        sources(&repository().join(dir), &mut code);
    }
    let text = std::fs::read_to_string(repository().join("docs/delivery.md")).unwrap();
    let table = text.split_once("## Faults and the tests").unwrap().1;
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    let mut num_named = 0;
    for row in rows {
        let tests = row.split('|').nth(2).unwrap();
        // Between backticks: perhaps the package and the module, then the test.
        for named in tests.split('`').skip(1).step_by(2).filter(|name| name.contains('_')) {
            let test = named.rsplit([':', ' ']).next().unwrap();
            assert!(code.contains(&format!("fn {test}()")), "no test is named {test}: {row}");
            num_named += 1;
        }
    }
    assert!(num_named > 30, "only {num_named} tests were found in the table");
}
