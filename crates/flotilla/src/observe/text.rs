//! The text format of Prometheus, with flotilla's prefix. Names after the prefix are those that
//! boards for other inference servers know.

use std::fmt::{Display, Write};

/// What all names begin with.
const PREFIX: &str = "flotilla:";

/// Labels of one value.
pub(crate) type Labels<'a> = &'a [(&'a str, &'a str)];

/// A histogram's values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buckets<'a> {
    /// Upper bounds, and how many observations were at most that.
    pub(crate) buckets: &'a [(f64, u64)],
    /// How many there were.
    pub(crate) count: u64,
    /// Their sum.
    pub(crate) sum: f64,
}

/// A page of metrics as it is written.
#[derive(Debug, Default)]
pub(crate) struct Page(String);

impl Page {
    /// A value that only grows; its name ends in `_total`.
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.counters(name, help, [(&[] as Labels<'_>, value)]);
    }

    /// The same with labels.
    pub(crate) fn counters<'a, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) {
        self.family(name, help, "counter");
        values.into_iter().for_each(|(labels, value)| self.sample(name, labels, value));
    }

    /// A value that goes up and down.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauges(name, help, [(&[] as Labels<'_>, value)]);
    }

    /// The same with labels.
    pub(crate) fn gauges<'a, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, V)>,
    ) {
        self.family(name, help, "gauge");
        values.into_iter().for_each(|(labels, value)| self.sample(name, labels, value));
    }

    /// Observations counted by size.
    pub(crate) fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, Buckets<'a>)>,
    ) {
        self.family(name, help, "histogram");
        let bucket = format!("{name}_bucket");
        for (labels, Buckets { buckets, count, sum }) in values {
            let bounds = buckets.iter().map(|(bound, count)| (bound.to_string(), *count));
            for (bound, count) in bounds.chain([("+Inf".to_owned(), count)]) {
                self.sample(&bucket, &[labels, &[("le", &bound)]].concat(), count);
            }
            self.sample(&format!("{name}_sum"), labels, sum);
            self.sample(&format!("{name}_count"), labels, count);
        }
    }

    /// The page.
    pub(crate) fn into_text(self) -> String {
        self.0
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) {
        self.write(format_args!("# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}\n"));
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.write(format_args!("{PREFIX}{name}"));
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            self.write(format_args!("{before}{label}=\"{}\"", escaped(value)));
        }
        let after = if labels.is_empty() { "" } else { "}" };
        self.write(format_args!("{after} {value}\n"));
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _infallible = self.0.write_fmt(text);
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_help_type_and_escaped_labels() {
        let mut page = Page::default();
        let labels = [("run", "a \"b\"\\\n")];
        page.counters("jobs_total", "Jobs.", [(&labels as Labels<'_>, 3)]);
        page.gauge("up", "Whether.", 1);
        assert_eq!(
            page.into_text(),
            "# HELP flotilla:jobs_total Jobs.\n# TYPE flotilla:jobs_total counter\n\
             flotilla:jobs_total{run=\"a \\\"b\\\"\\\\\\n\"} 3\n\
             # HELP flotilla:up Whether.\n# TYPE flotilla:up gauge\nflotilla:up 1\n"
        );
    }

    #[test]
    fn histogram_has_buckets_sum_and_count() {
        let mut page = Page::default();
        let wait = Buckets { buckets: &[(0.5, 2), (1.0, 2)], count: 3, sum: 3.5 };
        page.histograms("wait_seconds", "Wait.", [(&[] as Labels<'_>, wait)]);
        let text = page.into_text();
        let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                "flotilla:wait_seconds_bucket{le=\"0.5\"} 2",
                "flotilla:wait_seconds_bucket{le=\"1\"} 2",
                "flotilla:wait_seconds_bucket{le=\"+Inf\"} 3",
                "flotilla:wait_seconds_sum 3.5",
                "flotilla:wait_seconds_count 3",
            ]
        );
    }
}
