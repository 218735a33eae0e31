// Package convert turns an ordinary image into a lazy one: its layers become
// seekable, indexed archives (eStargz or zstd:chunked), and everything else stays.
package convert
