//! The scanner against expected elements and against a parser, whatever the reader hands out.

use super::*;
use proptest::prelude::*;
use serde_json::Value;

/// Hands out at most `chunk` bytes at a time.
struct Slow<'t>(&'t [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let num_bytes = self.0.len().min(self.1).min(buffer.len());
        let (now, later) = self.0.split_at(num_bytes);
        buffer[..num_bytes].copy_from_slice(now);
        self.0 = later;
        Ok(num_bytes)
    }
}

type Elements = Vec<(u64, Result<String, String>)>;

fn scan(array: &str, chunk: usize, max_bytes: usize) -> Elements {
    let text = array.strip_prefix('[').unwrap();
    let mut scanner = ArrayScanner::new(Slow(text.as_bytes(), chunk), 1, max_bytes);
    let mut elements = Vec::new();
    while let Some(record) = scanner.next().unwrap() {
        let content = record.content.map(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
        elements.push((record.line, content));
    }
    elements
}

/// The elements with their lines; a report as the word that it must contain.
fn expect(array: &str, expected: &[(u64, Result<&str, &str>)]) {
    for chunk in [1, 2, 7, 1000] {
        let elements = scan(array, chunk, 1000);
        assert_eq!(elements.len(), expected.len(), "{elements:?}");
        for ((line, content), (expected_line, expected)) in elements.iter().zip(expected) {
            assert_eq!(line, expected_line, "{elements:?}");
            match (content, expected) {
                (Ok(content), Ok(expected)) => assert_eq!(content, expected),
                (Err(reason), Err(word)) => assert!(reason.contains(word), "{reason}"),
                _ => panic!("{elements:?}"),
            }
        }
    }
}

#[test]
fn elements_come_with_their_lines() {
    expect(
        "[\n {\"a\": 1},\r\n {\"b\":\n  [2, \"}]\\\",\"]} , 3,\"x\"\n]\n",
        &[
            (2, Ok("{\"a\": 1}")),
            (3, Ok("{\"b\":\n  [2, \"}]\\\",\"]}")),
            (4, Ok("3")),
            (4, Ok("\"x\"")),
        ],
    );
    expect("[]", &[]);
    expect("[ \n ]\n", &[]);
}

#[test]
fn wrong_commas_are_named_and_lose_nothing() {
    expect("[{},\n]", &[(1, Ok("{}")), (2, Err("after the comma"))]);
    expect(
        "[,{},,\n{}]",
        &[(1, Err("before the comma")), (1, Ok("{}")), (1, Err("before the comma")), (2, Ok("{}"))],
    );
    expect("[{}\n{}]", &[(1, Ok("{}")), (2, Ok("{}"))]);
}

#[test]
fn what_follows_the_array_is_reported() {
    expect("[{}]\n{}\n", &[(1, Ok("{}")), (2, Err("after the array"))]);
}

#[test]
fn a_missing_end_is_reported_after_the_last_element() {
    expect("[{},\n{}\n", &[(1, Ok("{}")), (2, Ok("{}")), (3, Err("end of the file"))]);
    expect("[{},\n{\"a\": ", &[(1, Ok("{}")), (2, Err("cuts off"))]);
}

#[test]
fn a_lost_bracket_costs_one_element() {
    let array = "[\n  {\"a\": [1, 2},\n  {\"b\": {\"c\": 1}},\n  {\"d\": 2}\n]";
    expect(array, &[(2, Err("bracket")), (3, Ok("{\"b\": {\"c\": 1}}")), (4, Ok("{\"d\": 2}"))]);
    let pretty = "[\n  {\n    \"a\": {\n      \"b\": 1\n  },\n  {\n    \"c\": 2\n  }\n]\n";
    expect(pretty, &[(2, Err("bracket")), (6, Ok("{\n    \"c\": 2\n  }"))]);
    let compact = "[{\"a\": [1}, {\"b\": 2}, {\"c\": 3}]";
    expect(compact, &[(1, Err("bracket")), (1, Ok("{\"b\": 2}")), (1, Ok("{\"c\": 3}"))]);
}

#[test]
fn a_lost_quote_costs_one_element() {
    let array = "[\n{\"a\": \"x},\n{\"b\": 2},\n{\"c\": 3}\n]";
    expect(array, &[(2, Err("line break")), (3, Ok("{\"b\": 2}")), (4, Ok("{\"c\": 3}"))]);
}

#[test]
fn an_element_over_the_limit_is_passed_over_in_bounded_memory() {
    let long = "x".repeat(CHUNK_BYTES * 4);
    let array = format!("[{{\"a\": \"{long}\"}},\n{{\"b\": 2}}]");
    let mut scanner = ArrayScanner::new(&array.as_bytes()[1..], 1, 1000);
    let first = scanner.next().unwrap().unwrap();
    assert!(first.content.unwrap_err().contains("at most 1000 bytes"));
    let second = scanner.next().unwrap().unwrap();
    assert_eq!((second.line, second.content.unwrap()), (2, &b"{\"b\": 2}"[..]));
    assert!(scanner.next().unwrap().is_none());
    assert!(scanner.buffer.capacity() <= CHUNK_BYTES * 4);
}

#[test]
fn a_lost_bracket_in_a_long_file_costs_one_element() {
    let rest: Vec<String> = (0..1000).map(|k| format!("{{\"k\": {k}}}")).collect();
    let array = format!("[\n{{\"a\": [1, \n{}\n]", rest.join(",\n"));
    let elements = scan(&array, 64, 1000);
    assert_eq!(elements.len(), 1001);
    assert!(elements[0].1.is_err());
    assert_eq!(elements[1], (3, Ok("{\"k\": 0}".to_owned())));
}

#[test]
fn brackets_ten_thousand_deep_are_one_element() {
    let array = format!("[{}{},\n1]", "[".repeat(10_000), "]".repeat(10_000));
    let elements = scan(&array, 1 << 16, 1 << 20);
    assert_eq!(elements.len(), 2);
    assert_eq!(elements[1], (2, Ok("1".to_owned())));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~\\n\"\\\\\\[\\]{},é数]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec(("[a-c\"{\\\\]{0,3}", inner), 0..5)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn elements_are_those_of_a_parser(
        values in prop::collection::vec(json(), 0..8),
        chunk in 1_usize..40,
        pretty in any::<bool>(),
    ) {
        let text = if pretty {
            serde_json::to_string_pretty(&values).unwrap()
        } else {
            serde_json::to_string(&values).unwrap()
        };
        let elements: Vec<Value> = scan(&text, chunk, 1 << 20)
            .into_iter()
            .map(|(_, content)| serde_json::from_str(&content.unwrap()).unwrap())
            .collect();
        prop_assert_eq!(elements, values);
    }

    #[test]
    fn no_text_makes_the_scanner_fail_or_go_on_for_ever(
        text in "[\\[\\]{},:\"\\\\ \\na1]{0,200}",
        chunk in 1_usize..40,
    ) {
        let elements = scan(&format!("[{text}"), chunk, 50);
        prop_assert!(elements.len() <= text.len() + 1);
    }
}

/// Scans values that have no array round them.
fn scan_bare(text: &str, chunk: usize) -> Elements {
    let mut scanner = ArrayScanner::bare(Slow(text.as_bytes(), chunk), 1, 1000);
    let mut elements = Vec::new();
    while let Some(record) = scanner.next().unwrap() {
        let content = record.content.map(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
        elements.push((record.line, content));
    }
    elements
}

#[test]
fn bare_values_end_with_their_bracket_or_their_line() {
    let text = "{\"a\":\n 1} {\"b\": \"}\"}{}\n7, 8\n]\n,\n\"x\" \r\n{\"c\": [{}]} tail\n{}";
    let expected = [
        (1, "{\"a\":\n 1}"),
        (2, "{\"b\": \"}\"}"),
        (2, "{}"),
        (3, "7, 8"),
        (4, "]"),
        (5, ","),
        (6, "\"x\""),
        (7, "{\"c\": [{}]}"),
        (7, "tail"),
        (8, "{}"),
    ];
    let expected = expected.map(|(line, content)| (line, Ok(content.to_owned())));
    for chunk in [1, 2, 7, 1000] {
        assert_eq!(scan_bare(text, chunk), expected, "{chunk}");
    }
    assert!(scan_bare(" \n\n", 1).is_empty());
}

#[test]
fn a_bare_object_without_an_end_leaves_the_lines_after_it() {
    for broken in ["{\"a\": [}", "{\"a\": \"x", "{\"a\": {"] {
        let text = format!("{{}}\n{broken}\n{{}}\n{{}}");
        for chunk in [1, 7, 1000] {
            let elements = scan_bare(&text, chunk);
            let outline: Vec<_> = elements.iter().map(|(line, e)| (*line, e.is_ok())).collect();
            assert_eq!(outline, [(1, true), (2, false), (3, true), (4, true)], "{broken} {chunk}");
        }
    }
}

#[test]
fn a_value_is_ready_once_its_end_was_read() {
    let cases = [
        (true, "{\"a\": 1}", true),
        (true, "{\"a\": 1", false),
        (true, "7", false),
        (true, "7\n", true),
        (true, " \n", false),
        (false, ", {\"a\": 1},", true),
        (false, ", {\"a\": 1}", false),
        (false, ", {\"a\": 1", false),
        (false, "]", true),
    ];
    for (bare, rest, ready) in cases {
        let text = format!("{{}}{}{rest}", if bare { "\n" } else { "," });
        let reader = Slow(text.as_bytes(), 1000);
        let mut scanner = ArrayScanner { bare, ..ArrayScanner::new(reader, 1, 1000) };
        assert!(!scanner.is_ready());
        assert!(scanner.next().unwrap().is_some());
        assert_eq!(scanner.is_ready(), ready, "{bare} {rest}");
    }
}
