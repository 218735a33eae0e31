package toc

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// DefaultChunkSize is the size of the chunks of layers that are cut here, in
// bytes. The unit that can be verified is the unit that must be fetched.
const DefaultChunkSize = 128 << 10

// FromTar makes the table of contents of an ordinary layer, whose uncompressed
// tar is r: [Whole], its Digest the SHA-256 of all of r, up to its end, which is the layer's
// diffID once the caller has compared it. Nothing about r is verified here.
//
// Each regular file is cut into chunks of chunkSize bytes, 1 to [MaxChunkSize], the last one shorter.
// sink gets them in the order of the tar, a chunk with FileOffset 0 beginning the next file that is not
// empty. data is valid during the call. An error of sink ends FromTar and is
// returned as it is.
func FromTar(r io.Reader, chunkSize int64, sink func(c Chunk, data []byte) error) (*TOC, error) {
	if chunkSize <= 0 || chunkSize > MaxChunkSize {
		return nil, fmt.Errorf("tar: chunks of %d bytes", chunkSize)
	}
	h := sha256.New()
	in := bufio.NewReaderSize(r, 256<<10)
	tr := tar.NewReader(io.TeeReader(in, h))
	t := &TOC{Compression: Whole}
	buf := make([]byte, chunkSize)
	var total int64
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // names are checked below
			return nil, fmt.Errorf("tar: %w", err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := EntryFromHeader(hdr)
		if err != nil {
			return nil, fmt.Errorf("tar: %w", err)
		}
		if reserved(e.Name) {
			continue
		}
		if len(t.Entries) >= MaxEntries {
			return nil, fmt.Errorf("tar: more than %d entries", MaxEntries)
		}
		if e.Size > math.MaxInt64-total {
			return nil, fmt.Errorf("tar: entry %.300q: sizes add up to more than 2^63 bytes", e.Name)
		}
		total += e.Size
		e.FirstChunk = uint32(len(t.Chunks))
		for off := int64(0); off < e.Size; off += chunkSize {
			if len(t.Chunks) >= MaxChunks {
				return nil, fmt.Errorf("tar: entry %.300q: more than %d chunks", e.Name, MaxChunks)
			}
			data := buf[:min(chunkSize, e.Size-off)]
			if _, err := io.ReadFull(tr, data); err != nil {
				return nil, fmt.Errorf("tar: entry %.300q: %w", e.Name, noEOF(err))
			}
			c := Chunk{Digest: sha256.Sum256(data), FileOffset: off, Size: int64(len(data))}
			if err := sink(c, data); err != nil {
				return nil, err
			}
			t.Chunks = append(t.Chunks, c)
			e.NumChunks++
		}
		t.Entries = append(t.Entries, e)
	}
	if _, err := io.Copy(h, in); err != nil {
		return nil, fmt.Errorf("tar: %w", err)
	}
	h.Sum(t.Digest[:0])
	return t, nil
}

// OpenTar returns the tar in a layer, which is compressed with gzip or zstd, or not at all, as its first bytes say. The
// caller closes it; r stays open. It reads ahead of what it gives.
func OpenTar(r io.Reader) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 256<<10)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	const zstdFrame = "\x28\xb5\x2f\xfd"
	switch {
	case len(magic) >= 2 && string(magic[:2]) == "\x1f\x8b":
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		return z, nil
	case string(magic) == zstdFrame, len(magic) == 4 && magic[0]>>4 == 5 && string(magic[1:]) == skippable[1:]:
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(in), nil
}
