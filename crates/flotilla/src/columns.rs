//! Tables on a terminal, for the commands that print some.

use std::fmt::Write;

/// Where the text of a column stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Appends a table: a line of heads, then the rows, each with a cell for every head.
pub(crate) fn write_table<R: AsRef<[String]>>(
    text: &mut String,
    heads: &[(&str, Align)],
    rows: impl Iterator<Item = R>,
) {
    // A name is the user's: it must not move the cursor or break the row.
    let clean = |cell: &String| cell.replace(char::is_control, "?");
    let first = heads.iter().map(|(head, _)| (*head).to_owned()).collect();
    let rows = rows.map(|row| row.as_ref().iter().map(clean).collect());
    let rows: Vec<Vec<String>> = std::iter::once(first).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..heads.len()).map(|column| width(column).unwrap_or(0)).collect();
    for row in &rows {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(heads) {
            // Writing to a String cannot fail.
            let _infallible = match align {
                Align::Left => write!(line, "{cell:<width$}  "),
                Align::Right => write!(line, "{cell:>width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}
