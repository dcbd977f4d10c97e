//! A record of a queries file: the queries in it, in any of the three shapes.

use serde_json::value::RawValue;
use shared::{Dependencies, Generation, JobId, Query};

use super::fields::{Fields, kind};
use super::{Rejected, generation};

/// The fields that name packages, the first that is there counts.
pub(super) const DEPENDENCIES: [&str; 3] = ["target_dependency", "dependencies", "dependency"];

/// Reads a record: one query, or several of the nested shape.
pub(super) fn read(record: &[u8]) -> Vec<Result<Query, Rejected>> {
    let text = match std::str::from_utf8(record) {
        Ok(text) => text,
        Err(error) => return vec![Err(invalid_utf8(record, &error))],
    };
    let fields = match Fields::parse(text) {
        Ok(fields) => fields,
        Err(reason) => return vec![Err(Rejected::nameless(reason))],
    };
    let id = match fields.id() {
        Ok(id) => id,
        Err(reason) => return vec![Err(Rejected::nameless(reason))],
    };
    let result = match fields.check_doubles() {
        Err(reason) => Err(reason),
        Ok(()) if fields.has("queries") => nested(&fields, &id),
        Ok(()) => single(&fields, &id).map(|query| vec![Ok(query)]),
    };
    result.unwrap_or_else(|reason| {
        vec![Err(Rejected { id: Some(id), query: question(&fields), reason })]
    })
}

/// `{"id", "query", "target_api", "target_dependency", "generation"}`, or the legacy
/// `{"id", "description", "dependency"}`.
fn single(fields: &Fields<'_>, id: &JobId) -> Result<Query, String> {
    let legacy = !fields.has("query") && fields.has("description");
    let name = if legacy { "description" } else { "query" };
    Ok(Query {
        id: id.clone(),
        query: fields.filled_text(name)?,
        target_api: target_api(fields)?,
        dependencies: fields.dependencies(&DEPENDENCIES)?,
        generation: generation::read(fields)?,
    })
}

/// `{"id", "description", "target_dependency", "generation", "queries": [{"query", "target_api",
/// "generation"}]}`; what an entry says comes before what the record says.
fn nested(fields: &Fields<'_>, id: &JobId) -> Result<Vec<Result<Query, Rejected>>, String> {
    if fields.has("query") {
        return Err("expected either `query` or `queries`, given both".to_owned());
    }
    let common = (fields.dependencies(&DEPENDENCIES)?, generation::read(fields)?);
    let entries: Vec<&RawValue> = fields.read("queries", "a list")?.unwrap_or_default();
    if entries.is_empty() {
        return Err("expected queries in `queries`, given none".to_owned());
    }
    let queries = entries.iter().enumerate().map(|(k, raw)| {
        let id = JobId(format!("{id}#{k}"));
        entry(raw, &id, &common).map_err(|(query, reason)| Rejected {
            id: Some(id),
            query,
            reason: format!("entry {k} of `queries`: {reason}"),
        })
    });
    Ok(queries.collect())
}

/// One entry of a nested record; an error carries the question where it can be read.
fn entry(
    raw: &RawValue,
    id: &JobId,
    (dependencies, common): &(Dependencies, Generation),
) -> Result<Query, (Option<String>, String)> {
    if kind(raw.get()) != "an object" {
        let reason = format!("expected an object, given {}", kind(raw.get()));
        return Err((None, reason));
    }
    let fields = Fields::parse(raw.get()).map_err(|reason| (None, reason))?;
    let read = || {
        fields.check_doubles()?;
        Ok(Query {
            id: id.clone(),
            query: fields.filled_text("query")?,
            target_api: target_api(&fields)?,
            dependencies: dependencies.clone(),
            generation: generation::read(&fields)?.or(common),
        })
    };
    read().map_err(|reason| (question(&fields), reason))
}

/// The API that a query names; an empty text names none.
pub(super) fn target_api(fields: &Fields<'_>) -> Result<Option<String>, String> {
    let text = fields.text("target_api")?;
    Ok(text.filter(|text| !text.trim().is_empty()))
}

/// The question of a record that is rejected, for its line in the output.
pub(super) fn question(fields: &Fields<'_>) -> Option<String> {
    let readable = |name| fields.text(name).ok().flatten();
    readable("query").or_else(|| readable("description"))
}

/// The id of a record that isn't UTF-8 is read all the same, if the bad bytes are elsewhere.
pub(super) fn invalid_utf8(record: &[u8], error: &std::str::Utf8Error) -> Rejected {
    let lossy = String::from_utf8_lossy(record);
    let id = Fields::parse(&lossy)
        .and_then(|fields| fields.id())
        .ok()
        .filter(|id| !id.0.contains(char::REPLACEMENT_CHARACTER));
    Rejected {
        id,
        query: None,
        reason: format!(
            "expected UTF-8, given another encoding at byte {} of the record",
            error.valid_up_to() + 1
        ),
    }
}
