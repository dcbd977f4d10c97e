//! The full-text index: writing it and asking it. Knows terms and document numbers, nothing of
//! packages or texts. The only file that names tantivy's index types.

use std::path::Path;

use tantivy::collector::TopDocs;
use tantivy::columnar::Column;
use tantivy::directory::MmapDirectory;
use tantivy::indexer::NoMergePolicy;
use tantivy::query::{BooleanQuery, BoostQuery, ConstScoreQuery, Occur, Query, TermQuery};
use tantivy::schema::{
    FAST, Field, IndexRecordOption, STRING, Schema, TextFieldIndexing, TextOptions,
};
use tantivy::tokenizer::TextAnalyzer;
use tantivy::{
    Index, IndexReader, IndexSettings, IndexWriter, ReloadPolicy, Searcher, TantivyDocument, Term,
};

use crate::error::IndexError;

use super::analyzer::{CodeTokenizer, query_terms};

const TOKENIZER: &str = "code";
/// Memory of the writer before it starts a new segment.
const WRITER_BYTES: usize = 64 << 20;
/// How much more a match in a path or an alias counts than one in the text.
const NAME_BOOST: f32 = 2.0;
/// Terms that are looked at in one question, and how many of them, the rarest, are searched.
const MAX_TERMS_READ: usize = 1024;
const MAX_TERMS: usize = 32;
/// Bytes of a question that are looked at.
const MAX_QUERY_BYTES: usize = 64 << 10;
/// Matches fetched beyond those asked for, so that equal scores are put in order by path.
const MARGIN: usize = 32;

struct Fields {
    names: Field,
    text: Field,
    scope: Field,
    number: Field,
}

fn schema() -> (Schema, Fields) {
    let indexing = TextFieldIndexing::default()
        .set_tokenizer(TOKENIZER)
        .set_index_option(IndexRecordOption::WithFreqs);
    let text = TextOptions::default().set_indexing_options(indexing);
    let mut schema = Schema::builder();
    let fields = Fields {
        names: schema.add_text_field("names", text.clone()),
        text: schema.add_text_field("text", text),
        scope: schema.add_text_field("scope", STRING),
        number: schema.add_u64_field("number", FAST),
    };
    (schema.build(), fields)
}

/// Writes an index of documents numbered from 0.
pub(crate) struct SearchWriter {
    writer: IndexWriter,
    fields: Fields,
}

impl SearchWriter {
    /// Starts an index in an empty directory.
    pub(crate) fn create(dir: &Path) -> Result<Self, IndexError> {
        let (schema, fields) = schema();
        let directory = MmapDirectory::open(dir).map_err(tantivy::TantivyError::from)?;
        let index = Index::create(directory, schema, IndexSettings::default())?;
        register(&index);
        let writer = index.writer_with_num_threads(1, WRITER_BYTES)?;
        writer.set_merge_policy(Box::new(NoMergePolicy));
        Ok(Self { writer, fields })
    }

    /// Adds a document, found by searches that are filtered by any of `scopes`.
    pub(crate) fn add<'t>(
        &self,
        number: u32,
        names: impl Iterator<Item = &'t str>,
        text: &str,
        scopes: &[String],
    ) -> Result<(), IndexError> {
        let mut document = TantivyDocument::default();
        document.add_u64(self.fields.number, u64::from(number));
        for name in names {
            document.add_text(self.fields.names, name);
        }
        document.add_text(self.fields.text, text);
        for scope in scopes {
            document.add_text(self.fields.scope, scope);
        }
        self.writer.add_document(document)?;
        Ok(())
    }

    /// Writes all to disk, as one segment in the order of the numbers: the same documents give
    /// the same answers, equal scores included.
    pub(crate) fn finish(mut self) -> Result<(), IndexError> {
        self.writer.commit()?;
        let searcher = open_reader(self.writer.index())?.searcher();
        let mut segments = Vec::new();
        for segment in searcher.segment_readers() {
            let numbers = segment.fast_fields().u64("number")?;
            segments.push((numbers.first(0), segment.segment_id()));
        }
        drop(searcher);
        segments.sort_unstable();
        if segments.len() > 1 {
            let ids: Vec<_> = segments.into_iter().map(|(_, id)| id).collect();
            self.writer.merge(&ids).wait()?;
            self.writer.garbage_collect_files().wait()?;
        }
        self.writer.wait_merging_threads()?;
        Ok(())
    }
}

fn register(index: &Index) {
    index.tokenizers().register(TOKENIZER, TextAnalyzer::from(CodeTokenizer::default()));
}

fn open_reader(index: &Index) -> Result<IndexReader, IndexError> {
    Ok(index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?)
}

/// An index to ask.
pub(crate) struct SearchIndex {
    searcher: Searcher,
    fields: Fields,
    /// The documents' numbers, a column for each segment.
    numbers: Vec<Column<u64>>,
}

impl SearchIndex {
    /// Opens what [`SearchWriter`] has written.
    pub(crate) fn open(dir: &Path) -> Result<Self, IndexError> {
        let index = Index::open_in_dir(dir)?;
        let (expected, fields) = schema();
        if index.schema() != expected {
            return Err(IndexError::Damaged("its schema is another".to_owned()));
        }
        register(&index);
        let searcher = open_reader(&index)?.searcher();
        let numbers = searcher
            .segment_readers()
            .iter()
            .map(|segment| segment.fast_fields().u64("number"))
            .collect::<Result<_, _>>()?;
        Ok(Self { searcher, fields, numbers })
    }

    /// The best documents for a question, best first, somewhat more than `limit`.
    ///
    /// With scopes, only documents in one of them. The question is taken as words: no sign in it
    /// means anything.
    pub(crate) fn search(
        &self,
        question: &str,
        scopes: &[String],
        limit: usize,
    ) -> Result<Vec<(u32, f32)>, IndexError> {
        let Some(query) = self.query(question, scopes)? else {
            return Ok(Vec::new());
        };
        // Room for each is made at once, so no more than there can be.
        let limit = limit.min(self.searcher.num_docs() as usize);
        let best = TopDocs::with_limit(limit + MARGIN).order_by_score();
        let found = self.searcher.search(&query, &best)?;
        let numbered = found.into_iter().filter_map(|(score, address)| {
            let numbers = self.numbers.get(address.segment_ord as usize)?;
            let number = u32::try_from(numbers.first(address.doc_id)?).ok()?;
            Some((number, score))
        });
        Ok(numbered.collect())
    }

    fn query(
        &self,
        question: &str,
        scopes: &[String],
    ) -> Result<Option<Box<dyn Query>>, IndexError> {
        let mut known = self.known_terms(question)?;
        // The rarest say most.
        known.sort_by_key(|known| known.num_documents);
        known.truncate(MAX_TERMS);
        if known.is_empty() {
            return Ok(None);
        }
        let terms = known.into_iter().flat_map(|known| known.terms);
        let clauses = terms.map(|term| {
            let boost = if term.field() == self.fields.names { NAME_BOOST } else { 1.0 };
            let term = TermQuery::new(term, IndexRecordOption::WithFreqs);
            Box::new(BoostQuery::new(Box::new(term), boost)) as Box<dyn Query>
        });
        let matching: Box<dyn Query> = Box::new(BooleanQuery::union(clauses.collect()));
        if scopes.is_empty() {
            return Ok(Some(matching));
        }
        let filters = scopes.iter().map(|scope| {
            let term = Term::from_field_text(self.fields.scope, scope);
            let term = TermQuery::new(term, IndexRecordOption::Basic);
            Box::new(ConstScoreQuery::new(Box::new(term), 0.0)) as Box<dyn Query>
        });
        let filter: Box<dyn Query> = Box::new(BooleanQuery::union(filters.collect()));
        Ok(Some(Box::new(BooleanQuery::new(vec![(Occur::Must, filter), (Occur::Must, matching)]))))
    }

    /// The words of a question that are in some document.
    fn known_terms(&self, question: &str) -> Result<Vec<KnownWord>, IndexError> {
        let question = &question[..question.floor_char_boundary(MAX_QUERY_BYTES)];
        let mut known = Vec::new();
        for text in query_terms(question, MAX_TERMS_READ) {
            let mut word = KnownWord::default();
            for field in [self.fields.names, self.fields.text] {
                let term = Term::from_field_text(field, &text);
                let num_documents = self.searcher.doc_freq(&term)?;
                if num_documents > 0 {
                    word.num_documents += num_documents;
                    word.terms.push(term);
                }
            }
            if word.num_documents > 0 {
                known.push(word);
            }
        }
        Ok(known)
    }
}

/// A word of a question, with the fields that have it.
#[derive(Default)]
struct KnownWord {
    num_documents: u64,
    terms: Vec<Term>,
}
