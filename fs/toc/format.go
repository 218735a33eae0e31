package toc

import (
	"errors"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
)

// Names that the formats reserve at the root of a layer. They are no files of
// the image: neither [Parse] nor [FromTar] returns them.
const (
	// TarName is the file that holds the table of contents of a gzip layer.
	TarName = estargz.TOCTarName
	// PrefetchLandmark ends what is worth fetching before it is asked for.
	PrefetchLandmark = estargz.PrefetchLandmark
	// NoPrefetchLandmark says that nothing is.
	NoPrefetchLandmark = estargz.NoPrefetchLandmark
)

// reserved reports whether a name, in the form of [Entry.Name], is of the format and
// not of the image.
func reserved(name string) bool {
	return name == TarName || name == PrefetchLandmark || name == NoPrefetchLandmark
}

// Annotations of a layer's descriptor. The two families of zstd:chunked keys mean
// the same: containers/storage used the first, and what stargz-snapshotter writes, until
// v1.50, and has used the second since.
const (
	// DigestAnnotation is the digest of the inflated table of contents (JSON).
	// containers/storage refuses a layer that has it and [PodmanChecksumAnnotation].
	DigestAnnotation = estargz.TOCJSONDigestAnnotation
	// PositionAnnotation is our own, of gzip layers, which have no such key: where the
	// table of contents is, "offset:size:inflated", three decimal numbers of
	// bytes. offset (in the blob) and size are of the gzip member, inflated is the JSON's size.
	PositionAnnotation = "lazuli.toc.position"
	// UncompressedSizeAnnotation is the size of the layer's tar, in bytes.
	UncompressedSizeAnnotation = estargz.StoreUncompressedSizeAnnotation

	// ZstdChecksumAnnotation and PodmanChecksumAnnotation are the digest of the
	// compressed table of contents.
	ZstdChecksumAnnotation   = zstdchunked.ManifestChecksumAnnotation
	PodmanChecksumAnnotation = "io.github.containers.zstd-chunked.manifest-checksum"
	// ZstdPositionAnnotation and PodmanPositionAnnotation say where the table of
	// contents of a zstd:chunked layer is: "offset:size:inflated:type" with type 1.
	ZstdPositionAnnotation   = zstdchunked.ManifestPositionAnnotation
	PodmanPositionAnnotation = "io.github.containers.zstd-chunked.manifest-position"
)

// ErrNotLazy is what errors wrap that say why a layer cannot be read piece by
// piece. There is nothing wrong with such a layer: take it as a whole, see [FromTar].
var ErrNotLazy = errors.New("not lazy")

// Bounds of a table of contents. Whoever makes one larger has made a layer that
// nothing here reads piece by piece.
const (
	// MaxInflated is the size of the JSON, in bytes. 100,000 files with a digest
	// each are about 31 MB.
	MaxInflated = 1 << 30
	// MaxEntries is the number of entries that make a file.
	MaxEntries = 2 << 20
	// MaxChunks is the number of chunks of all files: 512 GiB in chunks of 128 KiB.
	MaxChunks = 4 << 20
	// MaxXattrs is the size of one entry's extended attributes, names and values
	// together, in bytes: what Linux takes for one value.
	MaxXattrs = 64 << 10
)
