// Package profile is what a workload reads while it starts: pieces of files in the order of their first touch.
//
// A profile names paths and not content, so that it holds for the next build of an image too. It is made from
// a recording ([FromTouches]), merged with those of other runs ([Merge]), and says for an image which chunks a startup
// pack has to have ([Profile.Chunks]).
//
// As text it is one line per piece, a JSON object; lines that begin with # are comments:
//
//	{"path":"usr/lib/python3.11/os.py","piece":0,"share":1,"ms":113.2}
//
// A Profile is immutable once it is made. All functions may be called concurrently.
package profile

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"lazuli/fs/toc"
)

// PieceSize is how many bytes of a file a piece has; the last one of a file has less. It is the smallest
// chunk that converters usually make.
const PieceSize = 64 << 10

// A Piece is some bytes of a file that a start touches.
type Piece struct {
	Path  string  `json:"path"`  // from the root, without a leading slash
	Index int     `json:"piece"` // bytes Index*PieceSize and on
	Share float64 `json:"share"` // of the runs that touched it, 0 to 1; later runs count more
	MS    float64 `json:"ms"`    // when it was first touched, in milliseconds from the start
}

// A Profile is the pieces in the order of their first touch.
type Profile struct {
	Pieces []Piece
}

// A Touch is a read of an object.
type Touch struct {
	Key    toc.Digest // of the object
	Off, N int64      // bytes of the file
	After  time.Duration
}

// FromTouches returns the profile of one run. paths names the files of the image by their objects' keys: what several files share is
// counted for the first.
func FromTouches(touches []Touch, paths map[toc.Digest]string) *Profile {
	type id struct {
		path  string
		piece int
	}
	seen := map[id]bool{}
	p := new(Profile)
	for _, t := range touches {
		path, ok := paths[t.Key]
		if !ok || t.N <= 0 {
			continue
		}
		for i := t.Off / PieceSize; i <= (t.Off+t.N-1)/PieceSize; i++ {
			if id := (id{path, int(i)}); !seen[id] {
				seen[id] = true
				p.Pieces = append(p.Pieces, Piece{path, int(i), 1, float64(t.After.Microseconds()) / 1000})
			}
		}
	}
	p.sort()
	return p
}

func (p *Profile) sort() {
	slices.SortStableFunc(p.Pieces, func(a, b Piece) int { return cmp.Compare(a.MS, b.MS) })
}

// decay is how much a merge believes the newer profile: with each run, what is not touched any more counts a third less, and is left
// out when it is below forget.
const (
	decay  = 1.0 / 3
	forget = 0.05
)

// Merge returns the profile of the runs of old and a newer one. A nil old is none.
func Merge(old, newer *Profile) *Profile {
	return Learn(old, newer, func(Piece) bool { return false })
}

// Learn is [Merge] for a newer run of which not everything was seen: a piece of old that it does not have, and that is hidden, may
// have been touched, and counts as much as before.
func Learn(old, newer *Profile, hidden func(Piece) bool) *Profile {
	if old == nil {
		return newer
	}
	type id struct {
		path  string
		piece int
	}
	all := map[id]Piece{}
	touched := map[id]bool{}
	for _, x := range newer.Pieces {
		touched[id{x.Path, x.Index}] = true
	}
	for _, x := range old.Pieces {
		if touched[id{x.Path, x.Index}] || !hidden(x) {
			x.Share *= 1 - decay
		}
		all[id{x.Path, x.Index}] = x
	}
	for _, x := range newer.Pieces {
		was, ok := all[id{x.Path, x.Index}]
		if ok {
			x.MS = was.MS*(1-decay) + x.MS*decay
			x.Share = min(was.Share+x.Share*decay, 1)
		} else {
			x.Share *= decay
		}
		all[id{x.Path, x.Index}] = x
	}
	p := new(Profile)
	for _, x := range slices.SortedFunc(maps.Values(all), func(a, b Piece) int {
		return cmp.Or(cmp.Compare(a.MS, b.MS), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Index, b.Index))
	}) {
		if x.Share >= forget {
			p.Pieces = append(p.Pieces, x)
		}
	}
	return p
}

// Bound returns p with at most n pieces: those of the largest shares, of equal ones those that are touched first.
func (p *Profile) Bound(n int) *Profile {
	if len(p.Pieces) <= n {
		return p
	}
	b := &Profile{slices.Clone(p.Pieces)}
	slices.SortStableFunc(b.Pieces, func(a, b Piece) int { return cmp.Compare(b.Share, a.Share) })
	b.Pieces = b.Pieces[:n:n]
	b.sort()
	return b
}

// A Chunk is one chunk of a file that a profile wants.
type Chunk struct {
	Path  string     // of the file, the first that the profile names of those with the object
	Key   toc.Digest // of the object
	Index int
	toc.Chunk
}

// Chunks returns the chunks that the pieces with at least a share are in, each once, in the order of their first touch. file returns the
// chunks of the file at a path, or nil if the image has none there.
func (p *Profile) Chunks(share float64, file func(path string) []toc.Chunk) []Chunk {
	type known struct {
		path   string
		key    toc.Digest
		chunks []toc.Chunk
		seen   map[int]bool
	}
	files := map[string]*known{}
	objects := map[toc.Digest]*known{}
	var list []Chunk
	for _, x := range p.Pieces {
		if x.Share < share {
			continue
		}
		k, ok := files[x.Path]
		if !ok {
			if chunks := file(x.Path); len(chunks) > 0 {
				key := toc.ObjectKey(chunks)
				if k = objects[key]; k == nil {
					k = &known{x.Path, key, chunks, map[int]bool{}}
					objects[key] = k
				}
			}
			files[x.Path] = k
		}
		if k == nil {
			continue
		}
		from, to := int64(x.Index)*PieceSize, int64(x.Index+1)*PieceSize
		for i, c := range k.chunks {
			if c.FileOffset < to && c.FileOffset+c.Size > from && !k.seen[i] && !c.Hole {
				k.seen[i] = true
				list = append(list, Chunk{k.path, k.key, i, c})
			}
		}
	}
	return list
}

// maxPiece bounds a piece's index, so that its place in the file is a number.
const maxPiece = 1 << 46

// Parse reads a profile as [Profile.WriteTo] writes it, or a list of paths in the order of their first touch, as other tools write
// them: of those the first piece is meant, as of lines without a "piece". Leading slashes are dropped.
func Parse(r io.Reader) (*Profile, error) {
	p := new(Profile)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	n := 1
	for ; lines.Scan(); n++ {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		x := Piece{Share: 1, MS: float64(n)}
		if line[0] != '{' {
			x.Path = string(line)
		} else if err := json.Unmarshal(line, &x); err != nil {
			return nil, fmt.Errorf("profile: line %d: %w", n, err)
		}
		x.Path = strings.TrimLeft(x.Path, "/")
		if x.Path == "" || strings.Contains(x.Path, "\x00") || !utf8.ValidString(x.Path) || x.Index < 0 || x.Index > maxPiece || x.Share < 0 || x.Share > 1 {
			return nil, fmt.Errorf("profile: line %d: want a path, a piece of 0 or more, and a share from 0 to 1", n)
		}
		p.Pieces = append(p.Pieces, x)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("profile: line %d: %w", n, err)
	}
	p.sort()
	return p, nil
}

// WriteTo writes the profile as text.
func (p *Profile) WriteTo(w io.Writer) (int64, error) {
	var b bytes.Buffer
	lines := json.NewEncoder(&b)
	lines.SetEscapeHTML(false)
	for _, x := range p.Pieces {
		if err := lines.Encode(x); err != nil {
			return 0, err
		}
	}
	return b.WriteTo(w)
}
