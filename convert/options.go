package convert

import (
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/profile"
	"lazuli/fs/remote"
)

// Format is a format of lazy layers.
type Format string

const (
	// EStargz layers are gzip, which everything that runs containers can read.
	EStargz Format = "estargz"
	// ZstdChunked layers are zstd: faster to make and to read, and smaller.
	ZstdChunked Format = "zstd:chunked"
)

// Options say how an image is converted. The zero value is the recommendation.
type Options struct {
	// Format of the layers. "" is EStargz.
	Format Format
	// Platforms are the images of an index to take. None is all. An image that is not in an index
	// is taken whatever its platform.
	Platforms []v1.Platform
	// Level of compression: 1 to 9 for EStargz, 1 to 22 for ZstdChunked (of which its encoder
	// makes four). 0 is 7.
	Level int
	// ChunkSize is the largest piece of a file that is verified by itself, in bytes: 4 KiB to 64 MiB.
	// 0 is 192 KiB.
	ChunkSize int64
	// GroupSize is how many bytes of the tar share one compressed stream, which is fetched as a
	// whole, unless one chunk is larger. 0 is 128 KiB; 1 puts every chunk into a stream of its own, as
	// old readers need it (stargz-snapshotter before v0.13).
	GroupSize int64
	// Profile names the files that come first, in this order, as paths from the root. They are what
	// runtimes fetch ahead. Nil is none; see [ParseProfile].
	Profile []string
	// Pieces are what a start reads of files, for a startup pack that the image's manifest names. Nil is all of the files in Profile.
	Pieces *profile.Profile
	// NoPack makes no startup packs, neither of a profile nor of what an image's command can be seen to need.
	NoPack bool
	// Cache is a directory that remembers what was converted to what. "" remembers nothing.
	Cache string
	// TempDir is where layers wait for their upload: room for all of an image, and with a Profile for its
	// uncompressed layers too. "" is the system's directory for temporary files.
	TempDir string
	// Workers is how many layers' parts are compressed at once. 0 is GOMAXPROCS. The result does not depend on it.
	Workers int
	// Remote says how registries are reached.
	Remote remote.Options
	// Progress, if not nil, is told how far the conversion is.
	Progress *Progress
}

// A shape is what decides what bytes a layer becomes.
type shape struct {
	format       Format
	level        int
	chunk, group int64
}

// Defaults, chosen from the table in docs/convert.md.
const (
	defaultChunk = 192 << 10
	defaultGroup = 128 << 10
	defaultLevel = 7

	minChunk = 4 << 10
	maxChunk = 64 << 20
)

// version changes when the same options make other bytes than before.
const version = 1

func (o *Options) shape() (shape, error) {
	s := shape{o.Format, o.Level, o.ChunkSize, o.GroupSize}
	maxLevel := 9
	switch s.format {
	case "":
		s.format = EStargz
	case EStargz:
	case ZstdChunked:
		maxLevel = 22
	default:
		return s, fmt.Errorf("format %q: there are %s and %s", s.format, EStargz, ZstdChunked)
	}
	if s.level == 0 {
		s.level = defaultLevel
	}
	if s.chunk == 0 {
		s.chunk = defaultChunk
	}
	if s.group == 0 {
		s.group = defaultGroup
	}
	if s.level < 1 || s.level > maxLevel {
		return s, fmt.Errorf("level %d: %s has 1 to %d", s.level, s.format, maxLevel)
	}
	if s.chunk < minChunk || s.chunk > maxChunk {
		return s, fmt.Errorf("chunk size of %d bytes: want %d to %d", s.chunk, minChunk, maxChunk)
	}
	if s.group < 1 || s.group > maxChunk {
		return s, fmt.Errorf("group size of %d bytes: want 1 to %d", s.group, maxChunk)
	}
	return s, nil
}

// String is the same for two shapes that make the same bytes of every layer.
func (s shape) String() string {
	return fmt.Sprintf("%s/%d level=%d chunk=%d group=%d", s.format, version, s.level, s.chunk, s.group)
}

// memberSize is how many bytes a member has at most, but for headers that do not fit.
func (s shape) memberSize() int64 { return max(s.chunk, s.group) + memberSlack }
